// How far velocity predictions are from the target of the forward process, and from each other, sample by sample:
//
//   error     = mean_over_elements(weight * (velocity - target)^2), and so of the old and the reference velocity
//   drift     = mean_over_elements(weight * (velocity - other)^2) from the old and from the reference velocity
//   positive  = error of (1 - beta) * old_velocity + beta * velocity
//   negative  = error of (1 + beta) * old_velocity - beta * velocity
//   *_abs     = the same means of the absolute values
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
  bool implicit;  // whether the old velocity is mixed with the velocity, or has an error of its own
  double beta;
};

// What is computed without a reference velocity, in this order: kOwn: error, error_abs; kOld: these, old_error,
// old_error_abs, old_drift; kImplicit: positive, positive_abs, negative, negative_abs. With a reference velocity its
// drift follows, then its error unless kImplicit.
enum Mode { kOwn, kOld, kImplicit };

constexpr int kMaxMeans = 7;

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

FLOWGRPO_HD constexpr int own_means(Mode mode) { return mode == kOwn ? 2 : mode == kOld ? 5 : 4; }

FLOWGRPO_HD constexpr int count_means(Mode mode, bool with_reference) {
  return own_means(mode) + (!with_reference ? 0 : mode == kImplicit ? 1 : 2);
}

FLOWGRPO_HD Mode mode_of(const Residuals& residuals) {
  return residuals.implicit ? kImplicit : residuals.old_velocity.data ? kOld : kOwn;
}

FLOWGRPO_HD int num_means(const Residuals& residuals) {
  return count_means(mode_of(residuals), residuals.reference_velocity.data != nullptr);
}

// Where the weight of an element is among its sample's.
FLOWGRPO_HD int64_t weight_place(const WeightMap& map, int64_t element) {
  return element / (map.shared * map.inner) * map.inner + element % map.inner;
}

FLOWGRPO_HD float absolute(float value) { return fabsf(value); }
FLOWGRPO_HD double absolute(double value) { return fabs(value); }

// Adds a residual's square and absolute value to two sums.
template <typename Real>
FLOWGRPO_HD void add_residual(Real weight, Real residual, Real* sums) {
  sums[0] += weight * (residual * residual);
  sums[1] += weight * absolute(residual);
}

// What one element adds to the means without a reference velocity; only kOwn does without an old one.
template <Mode kMode, typename Real>
FLOWGRPO_HD void add_means(Real weight, Real velocity, Real target, Real old, Real beta, Real* sums) {
  const Real residual = velocity - target, drift = velocity - old;
  if (kMode == kImplicit) {
    add_residual(weight, residual - (1 - beta) * drift, sums);
    add_residual(weight, residual - (1 + beta) * drift, sums + 2);
    return;
  }
  add_residual(weight, residual, sums);
  if (kMode == kOld) {
    add_residual(weight, old - target, sums + 2);
    sums[4] += weight * (drift * drift);
  }
}

template <Mode kMode, typename Real>
FLOWGRPO_HD void add_reference_means(Real weight, Real velocity, Real target, Real reference, Real* sums) {
  const Real drift = velocity - reference, error = reference - target;
  sums[0] += weight * (drift * drift);
  if (kMode != kImplicit) sums[1] += weight * (error * error);
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
