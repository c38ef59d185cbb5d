// flow_step on the CPU, compiled once per instruction set.
#include "flow_step.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

template <typename Real>
static void step_chunk(const FlowStepArgs& args, int64_t index) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(index, transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const PhiloxKey key = philox_key(args.seed[range.sample]);
  MeanTile<Real> tile;
  Real noise[kTile] = {}, scratch[kTile], lanes[kLanes] = {};
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, transition.elements);
    mean_tile(transition, row, span, &tile);
    // A deterministic row adds zero times zero: the same sum, and NaN still travels, without drawing noise.
    if (row.c != 0) {
      normal_tile(key, philox_counter(element / kWordsPerBlock, static_cast<uint32_t>(row.step), kStepStream), noise);
    }
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
