// flow_log_prob and its backward on the CPU, compiled once per instruction set.
#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

// The velocity a drift is taken from, in the arithmetic dtype and zero behind the sample's end; null without one.
template <typename Real>
static const Real* reference_tile(const Reference& reference, Real scale, const Span& span, Real (*scratch)[kTile]) {
  if (!reference.velocity.data) return nullptr;
  const Real* velocity = load_tile(reference.velocity, span, scratch[0]);
  if (!reference.negative.data) return velocity;
  const Real* negative = load_tile(reference.negative, span, scratch[1]);
  for (int i = 0; i < kTile; ++i) scratch[0][i] = guided(velocity[i], negative[i], scale);
  return scratch[0];
}

// Adds the squares of a plain tile's distances, and those of its velocity from the reference.
template <typename Stored, typename Real>
static inline void add_plain_tile(const FlowLogProbArgs& args, const Row<Real>& row, const Span& span, Real* lanes,
                                  Real* drift_lanes) {
  const PlainTile<Stored> tile(args.transition, args.next_latents, span);
  add_plain_squares(row, tile, lanes);
  if (args.reference.velocity.data)
    add_squares(tile.velocity, at<const Stored>(args.reference.velocity, span), drift_lanes);
}

// Whether there is no reference, or one that is read as it is stored.
static inline bool is_plain(const Reference& reference, const Transition& transition) {
  return !reference.velocity.data ||
         (reference.velocity.dtype == transition.velocity.dtype && !reference.negative.data);
}

template <typename Real>
static void log_prob_chunk(const FlowLogProbArgs& args, int64_t index) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(index, transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const Real scale = static_cast<Real>(transition.guidance_scale);
  const bool plain_extras = !args.mean && is_plain(args.reference, transition);
  const bool is_bfloat16 = transition.latents.dtype == DType::kBFloat16;
  MeanTile<Real> tile;
  Real scratch[kTile], reference_scratch[2][kTile], lanes[kLanes] = {}, drift_lanes[kLanes] = {};
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, transition.elements);
    if (plain_extras && is_plain(transition, args.next_latents, span.count)) {
      is_bfloat16 ? add_plain_tile<Bfloat16>(args, row, span, lanes, drift_lanes)
                  : add_plain_tile<Real>(args, row, span, lanes, drift_lanes);
      continue;
    }
    mean_tile(transition, row, span, &tile);
    if (args.mean) widen(tile.mean, static_cast<Real*>(args.mean) + span.offset, span.count);
    const Real* reference = reference_tile(args.reference, scale, span, reference_scratch);
    if (reference) add_squares(tile.velocity, reference, drift_lanes);
    const Real* next = load_tile(args.next_latents, span, scratch);
    for (int i = span.count; i < kTile; ++i) tile.mean[i] = 0;
    add_squares(next, tile.mean, lanes);
  }
  args.partials[index] = sum_lanes(lanes);
  if (args.reference.velocity.data) args.drift_partials[index] = sum_lanes(drift_lanes);
}

// The value of each element's position, in runs.
template <typename Real>
static void spread_tile(const PositionMap& map, const Span& span, int64_t sample, Real* values) {
  const Real* source = static_cast<const Real*>(map.data) + sample * map.positions;
  const int64_t period = map.channels_last ? map.channels : map.positions;
  int64_t outer = span.element / period, inner = span.element % period;
  for (int i = 0; i < span.count;) {
    const int left = span.count - i;
    const int run = period - inner < left ? static_cast<int>(period - inner) : left;
    if (map.channels_last) {
      const Real value = source[outer];
      for (int k = 0; k < run; ++k) values[i + k] = value;
    } else {
      widen(source + inner, values + i, run);
    }
    i += run;
    ++outer;
    inner = 0;
  }
}

// Adds the gradients of the mean, the drift and the map to that of the log-probability.
template <typename Real>
static void add_extras(const FlowLogProbBackwardArgs& args, const Row<Real>& row, const Span& span, int64_t sample,
                       const MeanTile<Real>& tile, const Real* next, Real* gradient) {
  const Transition& transition = args.transition;
  Real scratch[2][kTile];
  if (args.grad_mean) {
    const Real* grad_mean = static_cast<const Real*>(args.grad_mean) + span.offset;
    for (int i = 0; i < span.count; ++i) gradient[i] += row.b * grad_mean[i];
  }
  if (args.grad_drift) {
    const double incoming = static_cast<double>(static_cast<const Real*>(args.grad_drift)[sample]);
    const Real factor = drift_scale(row, incoming, transition.elements);
    const Real* reference = reference_tile(args.reference, static_cast<Real>(transition.guidance_scale), span, scratch);
    for (int i = 0; i < kTile; ++i) gradient[i] += factor * (tile.velocity[i] - reference[i]);
  }
  if (args.grad_map.data) {
    const Real factor = backward_scale(row, 1.0, args.grad_map.channels);
    spread_tile(args.grad_map, span, sample, scratch[0]);
    for (int i = 0; i < span.count; ++i) gradient[i] += factor * scratch[0][i] * (next[i] - tile.mean[i]);
  }
}

// Stores scale * gradient in the velocity's dtype.
template <typename Real>
static void store_scaled(const Buffer& buffer, const Span& span, const Real* gradient, Real scale) {
  Real scratch[kTile];
  Real* scaled = tile_target(buffer, span, scratch);
  for (int i = 0; i < kTile; ++i) scaled[i] = scale * gradient[i];
  store_tile(buffer, span, scaled);
}

// Whether the extras leave the gradient of a plain tile in registers: the drift's or the map's, of the same dtype.
static inline bool has_plain_extras(const FlowLogProbBackwardArgs& args) {
  if (args.grad_mean || (args.grad_drift && args.grad_map.data)) return false;
  return !args.grad_drift || is_plain(args.reference, args.transition);
}

// The gradient of a plain tile, formed in registers by the operations of backward_chunk() and add_extras().
template <typename Stored, typename Real>
static void plain_gradient(const FlowLogProbBackwardArgs& args, const Row<Real>& row, const Span& span, int64_t sample,
                           Real factor) {
  const PlainTile<Stored> tile(args.transition, args.next_latents, span);
  Stored* gradient = at<Stored>(args.grad_velocity, span);
  if (args.grad_drift) {
    const double incoming = static_cast<double>(static_cast<const Real*>(args.grad_drift)[sample]);
    const Real of_drift = drift_scale(row, incoming, args.transition.elements);
    const Stored* reference = at<Stored>(args.reference.velocity, span);
    for (int i = 0; i < kTile; ++i) {
      const Real apart = widened(tile.velocity[i]) - widened(reference[i]);
      store_rounded(factor * tile.distance(row, i) + of_drift * apart, &gradient[i]);
    }
  } else if (args.grad_map.data) {
    const Real of_map = backward_scale(row, 1.0, args.grad_map.channels);
    Real spread[kTile];
    spread_tile(args.grad_map, span, sample, spread);
    for (int i = 0; i < kTile; ++i) {
      const Real distance = tile.distance(row, i);
      store_rounded(factor * distance + of_map * spread[i] * distance, &gradient[i]);
    }
  } else {
    for (int i = 0; i < kTile; ++i) store_rounded(factor * tile.distance(row, i), &gradient[i]);
  }
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
  const bool extra = args.grad_mean || args.grad_drift || args.grad_map.data;
  const bool plain_extras = has_plain_extras(args);
  const bool is_bfloat16 = transition.latents.dtype == DType::kBFloat16;
  MeanTile<Real> tile;
  Real next_scratch[kTile], scratch[kTile];
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, transition.elements);
    if (plain_extras && is_plain(transition, args.next_latents, span.count)) {
      is_bfloat16 ? plain_gradient<Bfloat16>(args, row, span, range.sample, factor)
                  : plain_gradient<Real>(args, row, span, range.sample, factor);
      continue;
    }
    mean_tile(transition, row, span, &tile);
    const Real* next = load_tile(args.next_latents, span, next_scratch);
    Real* gradient = guidance ? scratch : tile_target(args.grad_velocity, span, scratch);
    for (int i = 0; i < kTile; ++i) gradient[i] = factor * (next[i] - tile.mean[i]);
    if (extra) add_extras(args, row, span, range.sample, tile, next, gradient);
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
