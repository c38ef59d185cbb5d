// flow_log_prob and its backward on the CPU, compiled once per instruction set.
#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

template <typename Real>
static void log_prob_chunk(const FlowLogProbArgs& args, int64_t index) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(index, transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  MeanTile<Real> tile;
  Real scratch[kTile], lanes[kLanes] = {};
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, transition.elements);
    if (!args.mean && is_plain(transition, args.next_latents, span.count)) {
      add_plain_squares(row, at<Real>(transition.latents, span), at<Real>(transition.velocity, span),
                        at<Real>(args.next_latents, span), lanes);
      continue;
    }
    mean_tile(transition, row, span, &tile);
    if (args.mean) widen(tile.mean, static_cast<Real*>(args.mean) + span.offset, span.count);
    const Real* next = load_tile(args.next_latents, span, scratch);
    for (int i = span.count; i < kTile; ++i) tile.mean[i] = 0;
    add_squares(next, tile.mean, lanes);
  }
  args.partials[index] = sum_lanes(lanes);
}

// Stores scale * gradient in the velocity's dtype.
template <typename Real>
static void store_scaled(const Buffer& buffer, const Span& span, const Real* gradient, Real scale) {
  Real scratch[kTile];
  Real* scaled = tile_target(buffer, span, scratch);
  for (int i = 0; i < kTile; ++i) scaled[i] = scale * gradient[i];
  store_tile(buffer, span, scaled);
}

template <typename Real>
static void backward_chunk(const FlowLogProbBackwardArgs& args, int64_t index) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(index, transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const Real* grad_log_prob = static_cast<const Real*>(args.grad_log_prob);
  const double incoming = grad_log_prob ? static_cast<double>(grad_log_prob[range.sample]) : 0.0;
  const Real factor = backward_scale(row, incoming, transition.elements);
  const Real scale = static_cast<Real>(transition.guidance_scale);
  const bool guidance = transition.negative_velocity.data != nullptr;
  if (!guidance && !args.grad_velocity.data) return;
  MeanTile<Real> tile;
  Real next_scratch[kTile], scratch[kTile];
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, transition.elements);
    if (!args.grad_mean && is_plain(transition, args.next_latents, span.count)) {
      const Real *latents = at<Real>(transition.latents, span), *velocity = at<Real>(transition.velocity, span);
      const Real* next = at<Real>(args.next_latents, span);
      Real* gradient = at<Real>(args.grad_velocity, span);
      for (int i = 0; i < kTile; ++i) gradient[i] = factor * (next[i] - mean_of(row, latents[i], velocity[i]));
      continue;
    }
    mean_tile(transition, row, span, &tile);
    const Real* next = load_tile(args.next_latents, span, next_scratch);
    Real* gradient = guidance ? scratch : tile_target(args.grad_velocity, span, scratch);
    for (int i = 0; i < kTile; ++i) gradient[i] = factor * (next[i] - tile.mean[i]);
    if (args.grad_mean) {
      const Real* grad_mean = static_cast<const Real*>(args.grad_mean) + span.offset;
      for (int i = 0; i < span.count; ++i) gradient[i] += row.b * grad_mean[i];
    }
    if (!guidance) {
      store_tile(args.grad_velocity, span, gradient);
      continue;
    }
    if (args.grad_velocity.data) store_scaled(args.grad_velocity, span, gradient, scale);
    if (args.grad_negative.data) store_scaled(args.grad_negative, span, gradient, 1 - scale);
  }
}

void flow_log_prob_chunk(const FlowLogProbArgs& args, int64_t index) {
  const bool is_double = args.transition.latents.dtype == DType::kFloat64;
  is_double ? log_prob_chunk<double>(args, index) : log_prob_chunk<float>(args, index);
}

void flow_log_prob_backward_chunk(const FlowLogProbBackwardArgs& args, int64_t index) {
  const bool is_double = args.transition.latents.dtype == DType::kFloat64;
  is_double ? backward_chunk<double>(args, index) : backward_chunk<float>(args, index);
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
