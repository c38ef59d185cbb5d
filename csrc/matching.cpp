// The residuals of velocity predictions and their backward on the CPU, compiled once per instruction set.
#include "matching.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

// What a kernel reads of a tile, in the arithmetic dtype and zero behind the sample's end; velocities it does not read
// are null. Without a weight map the weights are what the kernel set them to.
template <typename Real>
struct ResidualTile {
  const Real *velocity, *target, *old, *reference, *weight;
  Real scratch[4][kTile], weights[kTile];
};

// The weights of a tile where neighbours share one.
template <typename Real>
static void repeat_weights(const Real* source, int64_t shared, const Span& span, Real* weights) {
  const Real* weight = source + span.element / shared;
  int64_t left = shared - span.element % shared;
  for (int i = 0; i < span.count; ++weight, left = shared) {
    const int run = left < span.count - i ? static_cast<int>(left) : span.count - i;
    for (int k = 0; k < run; ++k) weights[i + k] = *weight;
    i += run;
  }
}

// The weights of a tile, run by run of neighbours that differ: the map itself where the tile lies in one run.
template <typename Real>
static const Real* gather_weights(const Real* source, const WeightMap& map, const Span& span, Real* weights) {
  for (int i = 0; i < span.count;) {
    const int64_t element = span.element + i, left = map.inner - element % map.inner;
    const Real* run_start = source + weight_place(map, element);
    if (left >= kTile && span.count == kTile && i == 0) return run_start;
    const int run = left < span.count - i ? static_cast<int>(left) : span.count - i;
    widen(run_start, weights + i, run);
    i += run;
  }
  return weights;
}

template <typename Real>
static const Real* weight_tile(const WeightMap& map, const Span& span, int64_t sample, Real* weights) {
  if (!map.data) return weights;
  const Real* source = static_cast<const Real*>(map.data) + sample * map.stride;
  for (int i = span.count; i < kTile; ++i) weights[i] = 0;
  if (map.inner > 1) return gather_weights(source, map, span, weights);
  repeat_weights(source, map.shared, span, weights);
  return weights;
}

template <bool kOld, bool kReference, typename Real>
static inline void load_residuals(const Residuals& residuals, const Span& span, int64_t sample,
                                  ResidualTile<Real>* tile) {
  tile->velocity = load_tile(residuals.velocity, span, tile->scratch[0]);
  tile->target = load_tile(residuals.target, span, tile->scratch[1]);
  tile->old = kOld ? load_tile(residuals.old_velocity, span, tile->scratch[2]) : nullptr;
  tile->reference = kReference ? load_tile(residuals.reference_velocity, span, tile->scratch[3]) : nullptr;
  tile->weight = weight_tile(residuals.weight, span, sample, tile->weights);
}

constexpr int kRow = 16;  // neighbouring elements that go to different lanes
constexpr int kBlock = kTile / kLanes * kRow;

// Block by block, each to lanes of its own: they stay in registers over its rows, and memory is read in order.
template <Mode kMode, bool kReference, bool kWeight, typename Real>
static inline void add_tile(const ResidualTile<Real>& tile, Real beta, Real (*lanes)[kLanes]) {
  constexpr int kMeans = count_means(kMode, kReference);
  const Real *velocity = tile.velocity, *target = tile.target, *old = tile.old, *reference = tile.reference;
  for (int start = 0, lane = 0; start < kTile; start += kBlock, lane += kRow) {
    for (int i = 0; i < kRow; ++i) {
      Real sums[kMeans];
      for (int mean = 0; mean < kMeans; ++mean) sums[mean] = lanes[mean][lane + i];
      for (int row = 0; row < kBlock; row += kRow) {
        const int k = start + row + i;
        const Real weight = kWeight ? tile.weight[k] : Real(1);
        add_means<kMode>(weight, velocity[k], target[k], kMode == kOwn ? Real(0) : old[k], beta, sums);
        if (kReference)
          add_reference_means<kMode>(weight, velocity[k], target[k], reference[k], sums + own_means(kMode));
      }
      for (int mean = 0; mean < kMeans; ++mean) lanes[mean][lane + i] = sums[mean];
    }
  }
}

template <typename Real, Mode kMode, bool kReference>
static void mean_chunk(const MatchingArgs& args, int64_t index) {
  constexpr int kMeans = count_means(kMode, kReference);
  const Residuals& residuals = args.residuals;
  const ChunkRange range = chunk_range(index, residuals.elements);
  const Real beta = static_cast<Real>(residuals.beta);
  ResidualTile<Real> tile;
  Real lanes[kMeans][kLanes] = {};
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, residuals.elements);
    load_residuals<kMode != kOwn, kReference>(residuals, span, range.sample, &tile);
    residuals.weight.data ? add_tile<kMode, kReference, true>(tile, beta, lanes)
                          : add_tile<kMode, kReference, false>(tile, beta, lanes);
  }
  const int64_t count = residuals.batch * num_chunks(residuals.elements);
  for (int mean = 0; mean < kMeans; ++mean) args.partials[mean * count + index] = sum_lanes(lanes[mean]);
}

template <typename Real, bool kOld, bool kReference>
static void gradient_chunk(const MatchingBackwardArgs& args, int64_t index) {
  const Residuals& residuals = args.residuals;
  const ChunkRange range = chunk_range(index, residuals.elements);
  const Slopes<Real> slopes = slopes_of<Real>(args, range.sample);
  ResidualTile<Real> tile;
  Real scratch[kTile];
  for (int i = 0; i < kTile; ++i) tile.weights[i] = 1;
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, residuals.elements);
    load_residuals<kOld, kReference>(residuals, span, range.sample, &tile);
    Real* gradient = tile_target(args.grad_velocity, span, scratch);
    for (int i = 0; i < kTile; ++i) {
      Real sum = slopes.error * (tile.velocity[i] - tile.target[i]);
      if (kOld) sum += slopes.old * (tile.velocity[i] - tile.old[i]);
      if (kReference) sum += slopes.reference * (tile.velocity[i] - tile.reference[i]);
      gradient[i] = tile.weight[i] * sum;
    }
    store_tile(args.grad_velocity, span, gradient);
  }
}

template <typename Real, Mode kMode>
static void matching_in(const MatchingArgs& args, int64_t index) {
  args.residuals.reference_velocity.data ? mean_chunk<Real, kMode, true>(args, index)
                                         : mean_chunk<Real, kMode, false>(args, index);
}

template <typename Real>
static void matching_of(const MatchingArgs& args, int64_t index) {
  switch (mode_of(args.residuals)) {
    case kOwn:
      return matching_in<Real, kOwn>(args, index);
    case kOld:
      return matching_in<Real, kOld>(args, index);
    case kImplicit:
      return matching_in<Real, kImplicit>(args, index);
  }
}

template <typename Real>
static void matching_backward_of(const MatchingBackwardArgs& args, int64_t index) {
  if (needs_old(args)) {
    args.grad_reference_drift ? gradient_chunk<Real, true, true>(args, index)
                              : gradient_chunk<Real, true, false>(args, index);
  } else {
    args.grad_reference_drift ? gradient_chunk<Real, false, true>(args, index)
                              : gradient_chunk<Real, false, false>(args, index);
  }
}

void matching_chunk(const MatchingArgs& args, int64_t index) {
  const bool is_double = args.residuals.velocity.dtype == DType::kFloat64;
  is_double ? matching_of<double>(args, index) : matching_of<float>(args, index);
}

void matching_backward_chunk(const MatchingBackwardArgs& args, int64_t index) {
  const bool is_double = args.residuals.velocity.dtype == DType::kFloat64;
  is_double ? matching_backward_of<double>(args, index) : matching_backward_of<float>(args, index);
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
