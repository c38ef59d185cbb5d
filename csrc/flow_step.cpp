// flow_step on the CPU, compiled once per instruction set.
#include "flow_step.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

// A plain tile, but for history: its mean, next latents and x0 prediction in one pass, by the operations of the general
// one, and the squares in another.
template <typename Stored, bool kHistory, typename Real>
static inline void plain_step(const FlowStepArgs& args, const Row<Real>& row, const Span& span, const Real* noise,
                              Real* lanes) {
  const Transition& transition = args.transition;
  const Stored* latents = at<const Stored>(transition.latents, span);
  const Stored* velocity = at<const Stored>(transition.velocity, span);
  const Real* x0_prev = static_cast<const Real*>(transition.x0_prev) + (kHistory ? span.offset : 0);
  Stored* __restrict next = at<Stored>(args.next_latents, span);
  Real mean[kTile];
  if (args.x0_pred) {
    Real* __restrict x0_pred = static_cast<Real*>(args.x0_pred) + span.offset;
    for (int i = 0; i < kTile; ++i) x0_pred[i] = widened(latents[i]) - row.sigma * widened(velocity[i]);
  }
  for (int i = 0; i < kTile; ++i) {
    Real value = mean_of<Real>(row, widened(latents[i]), widened(velocity[i]));
    if constexpr (kHistory) value += row.d * x0_prev[i];
    mean[i] = value;
    store_rounded(value + row.c * noise[i], &next[i]);
  }
  for (int start = 0; start < kTile; start += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const Real distance = widened(next[start + i]) - mean[start + i];
      lanes[i] += distance * distance;
    }
  }
}

template <typename Stored, typename Real>
static inline void plain_step(const FlowStepArgs& args, const Row<Real>& row, const Span& span, const Real* noise,
                              Real* lanes) {
  args.transition.x0_prev ? plain_step<Stored, true>(args, row, span, noise, lanes)
                          : plain_step<Stored, false>(args, row, span, noise, lanes);
}

template <typename Real>
static void step_chunk(const FlowStepArgs& args, int64_t index) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(index, transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const PhiloxKey key = philox_key(args.seed[range.sample]);
  const bool is_bfloat16 = transition.latents.dtype == DType::kBFloat16;
  MeanTile<Real> tile;
  Real noise[kTile] = {}, scratch[kTile], lanes[kLanes] = {};
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, transition.elements);
    // A deterministic row adds zero times zero: the same sum, and NaN still travels, without drawing noise.
    if (row.c != 0) {
      normal_tile(key, philox_counter(element / kWordsPerBlock, static_cast<uint32_t>(row.step), kStepStream), noise);
    }
    if (is_plain_but_history(transition, args.next_latents, span.count)) {
      is_bfloat16 ? plain_step<Bfloat16>(args, row, span, noise, lanes)
                  : plain_step<Real>(args, row, span, noise, lanes);
      continue;
    }
    mean_tile(transition, row, span, &tile);
    if (args.x0_pred) {
      Real* x0_pred = static_cast<Real*>(args.x0_pred) + span.offset;
      for (int i = 0; i < span.count; ++i) x0_pred[i] = tile.latents[i] - row.sigma * tile.velocity[i];
    }
    Real* next = tile_target(args.next_latents, span, scratch);
    for (int i = 0; i < kTile; ++i) next[i] = tile.mean[i] + row.c * noise[i];
    store_tile(args.next_latents, span, next);
    // The log-probability is that of the stored value.
    const Real* stored = load_tile(args.next_latents, span, scratch);
    for (int i = span.count; i < kTile; ++i) tile.mean[i] = 0;
    add_squares(stored, tile.mean, lanes);
  }
  args.partials[index] = sum_lanes(lanes);
}

void flow_step_chunk(const FlowStepArgs& args, int64_t index) {
  args.transition.latents.dtype == DType::kFloat64 ? step_chunk<double>(args, index) : step_chunk<float>(args, index);
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
