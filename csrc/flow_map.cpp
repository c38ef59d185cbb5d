// The log-probability of every position on the CPU, compiled once per instruction set.
#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

static_assert(kMapTile == kTile, "a work item fills a tile of the map");

template <typename Stored, typename Real>
static inline void square_plain_tile(const FlowLogProbArgs& args, const Row<Real>& row, const Span& span,
                                     Real* squares) {
  const PlainTile<Stored> tile(args.transition, args.next_latents, span);
  for (int i = 0; i < kTile; ++i) {
    const Real distance = tile.distance(row, i);
    squares[i] = distance * distance;
  }
}

// The squared distances of a tile, zero behind its end.
template <typename Real>
static void square_tile(const FlowLogProbArgs& args, const Row<Real>& row, const Span& span, MeanTile<Real>* tile,
                        Real* squares) {
  const Transition& transition = args.transition;
  if (is_plain(transition, args.next_latents, span.count)) {
    transition.latents.dtype == DType::kBFloat16 ? square_plain_tile<Bfloat16>(args, row, span, squares)
                                                 : square_plain_tile<Real>(args, row, span, squares);
    return;
  }
  mean_tile(transition, row, span, tile);
  const Real* next = load_tile(args.next_latents, span, squares);
  for (int i = 0; i < kTile; ++i) {
    const Real distance = next[i] - tile->mean[i];
    squares[i] = i < span.count ? distance * distance : Real(0);
  }
}

// Adds neighbouring elements to the lanes of their position.
template <typename Real>
static inline void add_run(const Real* values, int count, Real* lanes) {
  const int whole = count - count % kFold;
  for (int start = 0; start < whole; start += kFold) {
    for (int i = 0; i < kFold; ++i) lanes[i] += values[start + i];
  }
  for (int i = whole; i < count; ++i) lanes[i - whole] += values[i];
}

template <typename Real>
static inline void add_pairs(const Real* values, int count, Real* sums) {
  for (int i = 0; i < count; ++i) sums[i] = values[2 * i] + values[2 * i + 1];
}

// Sums over the channels of up to kMapTile positions from `first`: channel after channel, or with channels last, run
// after run of the neighbouring elements.
template <typename Real>
static void sum_channels(const FlowLogProbArgs& args, const Row<Real>& row, int64_t sample, int64_t first,
                         double* sums) {
  const int64_t elements = args.transition.elements, channels = args.map.channels, positions = args.map.positions;
  const int64_t end = first + kMapTile < positions ? first + kMapTile : positions;
  MeanTile<Real> tile;
  Real squares[kTile];
  if (!args.map.channels_last) {
    Real totals[kTile] = {};
    for (int64_t channel = 0; channel < channels; ++channel) {
      const int64_t start = channel * positions;
      square_tile(args, row, span_of({sample, start + first, start + end}, start + first, elements), &tile, squares);
      for (int i = 0; i < kTile; ++i) totals[i] += squares[i];
    }
    for (int i = 0; i < kTile; ++i) sums[i] = static_cast<double>(totals[i]);
    return;
  }
  const ChunkRange range = {sample, first * channels, end * channels};
  Real lanes[kFold * kMapTile] = {}, of4[4 * kMapTile], of2[2 * kMapTile], of1[kMapTile];
  int64_t channel = 0;
  Real* position = lanes;
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, elements);
    square_tile(args, row, span, &tile, squares);
    for (int i = 0; i < span.count;) {
      const int left = span.count - i;
      const int run = channels - channel < left ? static_cast<int>(channels - channel) : left;
      add_run(squares + i, run, position);
      i += run;
      channel += run;
      if (channel == channels) channel = 0, position += kFold;
    }
  }
  add_pairs(lanes, 4 * kMapTile, of4);
  add_pairs(of4, 2 * kMapTile, of2);
  add_pairs(of2, kMapTile, of1);
  for (int i = 0; i < kMapTile; ++i) sums[i] = static_cast<double>(of1[i]);
}

template <typename Real>
static void map_tile(const FlowLogProbArgs& args, int64_t index) {
  const PositionMap& map = args.map;
  const int64_t tiles = map_tiles(map), sample = index / tiles, first = (index % tiles) * kMapTile;
  const Row<Real> row = row_of<Real>(args.transition, sample);
  double sums[kMapTile] = {};
  sum_channels(args, row, sample, first, sums);
  Real* target = static_cast<Real*>(map.data) + sample * map.positions + first;
  const int64_t count = map.positions - first < kMapTile ? map.positions - first : kMapTile;
  for (int64_t i = 0; i < count; ++i) target[i] = static_cast<Real>(log_prob_of(row, sums[i], map.channels));
}

// Adds the squares of a tile to the map of channels that come first. Channels ascend, as they do in sum_channels().
template <typename Real>
static inline void add_to_map(const PositionMap& map, const Span& span, const Real* squares, Real* sums) {
  int64_t channel = span.element / map.positions, position = span.element % map.positions;
  for (int i = 0; i < span.count;) {
    const int left = span.count - i;
    const int run = map.positions - position < left ? static_cast<int>(map.positions - position) : left;
    Real* target = sums + position;
    if (channel == 0) {
      for (int k = 0; k < run; ++k) target[k] = squares[i + k];
    } else {
      for (int k = 0; k < run; ++k) target[k] += squares[i + k];
    }
    i += run;
    position = 0;
    ++channel;
  }
}

// A sample in one pass: the partial sums of its chunks, with the bits of flow_log_prob_chunk(), and its map.
template <typename Real>
static void map_sample(const FlowLogProbArgs& args, int64_t sample) {
  const PositionMap& map = args.map;
  const int64_t elements = args.transition.elements, chunks = num_chunks(elements);
  const Row<Real> row = row_of<Real>(args.transition, sample);
  Real* sums = static_cast<Real*>(map.data) + sample * map.positions;
  MeanTile<Real> tile;
  Real squares[kTile];
  for (int64_t index = sample * chunks; index < (sample + 1) * chunks; ++index) {
    const ChunkRange range = chunk_range(index, elements);
    Real lanes[kLanes] = {};
    for (int64_t element = range.first; element < range.last; element += kTile) {
      const Span span = span_of(range, element, elements);
      square_tile(args, row, span, &tile, squares);
      for (int start = 0; start < kTile; start += kLanes) {
        for (int i = 0; i < kLanes; ++i) lanes[i] += squares[start + i];
      }
      add_to_map(map, span, squares, sums);
    }
    args.partials[index] = sum_lanes(lanes);
  }
  for (int64_t i = 0; i < map.positions; ++i) {
    sums[i] = static_cast<Real>(log_prob_of(row, static_cast<double>(sums[i]), map.channels));
  }
}

void flow_log_prob_map_sample(const FlowLogProbArgs& args, int64_t index) {
  args.transition.latents.dtype == DType::kFloat64 ? map_sample<double>(args, index) : map_sample<float>(args, index);
}

void flow_log_prob_map_tile(const FlowLogProbArgs& args, int64_t index) {
  args.transition.latents.dtype == DType::kFloat64 ? map_tile<double>(args, index) : map_tile<float>(args, index);
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
