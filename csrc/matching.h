// How far velocity predictions are from the target of the forward process, and from each other, sample by sample:
//
//   error           = mean_over_elements(weight * (velocity - target)^2), and so of the old and the reference velocity
//   old_drift       = mean_over_elements(weight * (velocity - old_velocity)^2), and so from the reference velocity
//   positive        = error of (1 - beta) * old_velocity + beta * velocity
//   negative        = error of (1 + beta) * old_velocity - beta * velocity
//   *_abs           = the same means of the absolute values
//
// Reductions run over chunks counted from the start of a sample and the partial sums of the chunks are added in order,
// so nothing depends on the batch around a sample or on the thread count.
#pragma once

#include <math.h>

#include "flow_step.h"

namespace flowgrpo_fast {

// Weights that repeat along one run of axes: a sample lies as [outer, shared, inner], its weights as [outer, inner].
struct WeightMap {
  const void* data;  // optional, arithmetic dtype
  int64_t shared, inner;
  int64_t stride;  // weights a sample, 0 where all samples have the same
};

// One sample has `elements` values; arrays are contiguous [batch, elements].
struct Residuals {
  Buffer velocity, target;
  Buffer old_velocity, reference_velocity;  // optional
  WeightMap weight;
  int64_t batch, elements;
  double beta;
};

// The means are numbered: error and error_abs; with an old velocity its error and error_abs, old_drift, positive and
// negative, each followed by its abs; with a reference velocity its error and drift.
constexpr int kOwnMeans = 2, kOldMeans = 7, kReferenceMeans = 2;
constexpr int kMaxMeans = kOwnMeans + kOldMeans + kReferenceMeans;

struct MatchingArgs {
  Residuals residuals;
  void* means[kMaxMeans];  // out [batch] each, arithmetic dtype
  double* partials;        // workspace [means, batch, chunks]
};

struct MatchingBackwardArgs {
  Residuals residuals;
  const void* grad_error;  // optional [batch], arithmetic dtype, as the following
  const void* grad_old_drift;
  const void* grad_positive;
  const void* grad_negative;
  const void* grad_reference_drift;
  Buffer grad_velocity;  // out, dtype of velocity
};

// Where the means with a reference velocity start.
FLOWGRPO_HD constexpr int reference_means_at(bool with_old) { return kOwnMeans + (with_old ? kOldMeans : 0); }

FLOWGRPO_HD constexpr int count_means(bool with_old, bool with_reference) {
  return reference_means_at(with_old) + (with_reference ? kReferenceMeans : 0);
}

FLOWGRPO_HD int num_means(const Residuals& residuals) {
  return count_means(residuals.old_velocity.data != nullptr, residuals.reference_velocity.data != nullptr);
}

// Where the weight of an element is among its sample's.
FLOWGRPO_HD int64_t weight_place(const WeightMap& map, int64_t element) {
  return element / (map.shared * map.inner) * map.inner + element % map.inner;
}

FLOWGRPO_HD float absolute(float value) { return fabsf(value); }
FLOWGRPO_HD double absolute(double value) { return fabs(value); }

// Adds a residual's square and absolute value to the first two sums.
template <typename Real>
FLOWGRPO_HD void add_residual(Real weight, Real residual, Real* sums, int stride) {
  sums[0] += weight * (residual * residual);
  sums[stride] += weight * absolute(residual);
}

// What one element adds to the means of the velocity itself, those with an old and those with a reference velocity; the
// sums lie `stride` apart.
template <typename Real>
FLOWGRPO_HD void add_own(Real weight, Real velocity, Real target, Real* sums, int stride) {
  add_residual(weight, velocity - target, sums, stride);
}

template <typename Real>
FLOWGRPO_HD void add_old(Real weight, Real velocity, Real target, Real old, Real beta, Real* sums, int stride) {
  const Real residual = velocity - target, drift = velocity - old;
  add_residual(weight, old - target, sums, stride);
  sums[2 * stride] += weight * (drift * drift);
  add_residual(weight, residual - (1 - beta) * drift, sums + 3 * stride, stride);
  add_residual(weight, residual - (1 + beta) * drift, sums + 5 * stride, stride);
}

template <typename Real>
FLOWGRPO_HD void add_reference(Real weight, Real velocity, Real target, Real reference, Real* sums, int stride) {
  const Real error = reference - target, drift = velocity - reference;
  sums[0] += weight * (error * error);
  sums[stride] += weight * (drift * drift);
}

// d loss / d velocity of an element is its weight times
// error * (velocity - target) + old * (velocity - old_velocity) + reference * (velocity - reference_velocity).
template <typename Real>
struct Slopes {
  Real error, old, reference;
};

template <typename Real>
FLOWGRPO_HD double incoming_of(const void* grad, int64_t sample) {
  return grad ? static_cast<double>(static_cast<const Real*>(grad)[sample]) : 0.0;
}

template <typename Real>
FLOWGRPO_HD Slopes<Real> slopes_of(const MatchingBackwardArgs& args, int64_t sample) {
  const double beta = args.residuals.beta, scale = 2.0 / static_cast<double>(args.residuals.elements);
  const double positive = beta * incoming_of<Real>(args.grad_positive, sample);
  const double negative = beta * incoming_of<Real>(args.grad_negative, sample);
  const double error = incoming_of<Real>(args.grad_error, sample) + positive - negative;
  const double old = incoming_of<Real>(args.grad_old_drift, sample) - (1 - beta) * positive + (1 + beta) * negative;
  const double reference = incoming_of<Real>(args.grad_reference_drift, sample);
  return {static_cast<Real>(scale * error), static_cast<Real>(scale * old), static_cast<Real>(scale * reference)};
}

// Whether the gradient reads the old velocity.
FLOWGRPO_HD bool needs_old(const MatchingBackwardArgs& args) {
  return args.grad_old_drift || args.grad_positive || args.grad_negative;
}

FLOWGRPO_DECLARE_OP(matching, MatchingArgs)
FLOWGRPO_DECLARE_OP(matching_backward, MatchingBackwardArgs)

FLOWGRPO_DECLARE_KERNEL(matching_chunk, MatchingArgs)
FLOWGRPO_DECLARE_KERNEL(matching_backward_chunk, MatchingBackwardArgs)

}  // namespace flowgrpo_fast
