// The transition of every flow sampler, one row of coefficients a step, for both devices:
//
//   v            = negative + scale * (velocity - negative)                (with guidance)
//   mean         = a * latents + b * v (+ d * x0_prev)
//   next_latents = round_to_storage(mean + c * noise(seed, step, element))
//   log_prob     = -1/2 * inv_var * mean_over_elements((next_latents - mean)^2) + log_norm
//   x0_pred      = latents - sigma * v
//   drift        = mean_over_elements((mean - reference_mean)^2) = b^2 * mean_over_elements((v - v_reference)^2)
//   log_prob_map = log_prob with the mean taken over the channels of a position only
//
// The log-probability is taken of the stored value. Reductions run over chunks counted from the start of a sample and
// the partial sums of the chunks are added in order, so nothing depends on the batch around a sample or on the thread
// count.
#pragma once

#include "declare.h"
#include "philox.h"

namespace flowgrpo_fast {

constexpr int64_t kChunk = 4096;   // elements per partial sum
constexpr int64_t kMapTile = 256;  // positions of a map one work item fills
constexpr int kRowWidth = 8;       // columns of the coefficient table

// One sample has `elements` values; arrays are contiguous [batch, elements].
struct Transition {
  Buffer latents;
  Buffer velocity;
  Buffer negative_velocity;   // optional, dtype of velocity
  const void* x0_prev;        // optional, arithmetic dtype
  const float* coeffs;        // [num_steps, 8]
  const int64_t* step_index;  // null: `step` for all; else one value (stride 0) or one a sample (stride 1)
  int64_t step_stride;
  int64_t step;
  int64_t num_steps;
  int64_t batch;
  int64_t elements;
  double guidance_scale;
};

struct FlowStepArgs {
  Transition transition;
  const int64_t* seed;  // [batch]
  Buffer next_latents;  // out, dtype of latents
  void* log_prob;       // out [batch], arithmetic dtype
  void* x0_pred;        // out, optional, arithmetic dtype
  double* partials;     // workspace [batch, chunks]
};

// What a drift is taken from; guided by the transition's scale where it has a negative velocity.
struct Reference {
  Buffer velocity;  // optional
  Buffer negative;  // optional, dtype of velocity
};

// A value a position, for samples that lie as [channels, positions] or, with channels last, [positions, channels].
struct PositionMap {
  void* data;  // optional [batch, positions], arithmetic dtype
  int64_t channels, positions;
  bool channels_last;
};

struct FlowLogProbArgs {
  Transition transition;
  Buffer next_latents;
  void* log_prob;    // out [batch], arithmetic dtype
  double* partials;  // workspace [batch, chunks]
  void* mean;        // out, optional, arithmetic dtype
  Reference reference;
  void* drift;             // out [batch] where there is a reference, arithmetic dtype
  double* drift_partials;  // workspace [batch, chunks]
  PositionMap map;         // out
};

struct FlowLogProbBackwardArgs {
  Transition transition;
  Buffer next_latents;
  const void* grad_log_prob;  // optional [batch], arithmetic dtype
  const void* grad_mean;      // optional, arithmetic dtype
  Reference reference;
  const void* grad_drift;  // optional [batch], arithmetic dtype
  PositionMap grad_map;
  Buffer grad_velocity;  // out, optional, dtype of velocity
  Buffer grad_negative;  // out, optional, dtype of velocity
};

struct PhiloxArgs {
  const int64_t* seed;        // [batch]
  const int64_t* step_index;  // as in Transition
  int64_t step_stride;
  int64_t step;
  int64_t stream;
  int64_t batch;
  int64_t elements;
  Buffer normal;   // out: standard normals, or
  int64_t* words;  // out: the 32-bit words themselves
};

FLOWGRPO_HD int64_t num_chunks(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

FLOWGRPO_HD int64_t map_tiles(const PositionMap& map) { return (map.positions + kMapTile - 1) / kMapTile; }

// A row of the table in the dtype of the arithmetic.
template <typename Real>
struct Row {
  Real sigma, a, b, c, d;
  double inv_var, log_norm;
  int64_t step;
};

// A step outside the table (only possible for indices on a GPU, which nobody has read) gives a row of NaN.
template <typename Real>
FLOWGRPO_HD Row<Real> row_of(const Transition& transition, int64_t sample) {
  const int64_t step = transition.step_index ? transition.step_index[sample * transition.step_stride] : transition.step;
  const bool inside = step >= 0 && step < transition.num_steps;
  const float* row = transition.coeffs + (inside ? step : 0) * kRowWidth;
  const float poison = inside ? 0.0f : float_of(0x7fc00000u);
  return {static_cast<Real>(row[0] + poison),   static_cast<Real>(row[1] + poison),
          static_cast<Real>(row[2] + poison),   static_cast<Real>(row[3] + poison),
          static_cast<Real>(row[4] + poison),   static_cast<double>(row[5] + poison),
          static_cast<double>(row[6] + poison), step};
}

template <typename Real>
FLOWGRPO_HD Real guided(Real velocity, Real negative, Real scale) {
  return negative + scale * (velocity - negative);
}

template <typename Real>
FLOWGRPO_HD Real mean_of(const Row<Real>& row, Real latents, Real velocity) {
  return row.a * latents + row.b * velocity;
}

template <typename Real>
FLOWGRPO_HD double log_prob_of(const Row<Real>& row, double sum_of_squares, int64_t elements) {
  return -0.5 * row.inv_var * (sum_of_squares / static_cast<double>(elements)) + row.log_norm;
}

// d log_prob / d mean of one element is this times (next_latents - mean); d mean / d velocity is b.
template <typename Real>
FLOWGRPO_HD Real backward_scale(const Row<Real>& row, double grad_log_prob, int64_t elements) {
  return static_cast<Real>(grad_log_prob * row.inv_var * static_cast<double>(row.b) / static_cast<double>(elements));
}

template <typename Real>
FLOWGRPO_HD double drift_of(const Row<Real>& row, double sum_of_squares, int64_t elements) {
  return static_cast<double>(row.b) * static_cast<double>(row.b) * (sum_of_squares / static_cast<double>(elements));
}

// d drift / d v of one element is this times (v - v_reference).
template <typename Real>
FLOWGRPO_HD Real drift_scale(const Row<Real>& row, double grad_drift, int64_t elements) {
  const double b = static_cast<double>(row.b);
  return static_cast<Real>(grad_drift * 2.0 * b * b / static_cast<double>(elements));
}

FLOWGRPO_DECLARE_OP(flow_step, FlowStepArgs)
FLOWGRPO_DECLARE_OP(flow_log_prob, FlowLogProbArgs)
FLOWGRPO_DECLARE_OP(flow_log_prob_backward, FlowLogProbBackwardArgs)
FLOWGRPO_DECLARE_OP(philox, PhiloxArgs)

FLOWGRPO_DECLARE_KERNEL(flow_step_chunk, FlowStepArgs)
FLOWGRPO_DECLARE_KERNEL(flow_log_prob_chunk, FlowLogProbArgs)
FLOWGRPO_DECLARE_KERNEL(flow_log_prob_map_sample, FlowLogProbArgs)
FLOWGRPO_DECLARE_KERNEL(flow_log_prob_map_tile, FlowLogProbArgs)
FLOWGRPO_DECLARE_KERNEL(flow_log_prob_backward_chunk, FlowLogProbBackwardArgs)
FLOWGRPO_DECLARE_KERNEL(philox_chunk, PhiloxArgs)

}  // namespace flowgrpo_fast
