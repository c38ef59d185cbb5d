// The ops on groups on a GPU: a block a group or a prompt, and compact over all buffers in one launch.
#include "cuda_group.cuh"
#include "group.h"

namespace flowgrpo_fast::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the block divided by `count`, in every thread. May be called again at once: the next sum's barrier comes
// before `mean` is written again.
__device__ __forceinline__ double block_mean(double value, double count) {
  __shared__ double mean;
  const double sum = block_sum(value);
  if (threadIdx.x == 0) mean = sum / count;
  __syncthreads();
  return mean;
}

__device__ __forceinline__ int count_bits(unsigned bits) {
  bits -= bits >> 1 & 0x55555555u;
  bits = (bits & 0x33333333u) + (bits >> 2 & 0x33333333u);
  return static_cast<int>(((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24);
}

__device__ __forceinline__ bool in_a_group(const GroupAdvantagesArgs& args, int64_t sample) {
  return args.group_id[sample] >= 0 && args.group_id[sample] < args.num_groups;
}

__device__ __forceinline__ void poison(const GroupAdvantagesArgs& args, int64_t sample) {
  const int width = args.aggregate == Aggregate::kSeparate ? args.num_rewards : 1;
  for (int i = 0; i < width; ++i) store_real(args.advantages, sample * width + i, float_of(0x7fc00000u));
}

// Mean and population standard deviation of value(sample) over the samples that are in a group, by the whole block.
template <typename Value>
__device__ __forceinline__ Scale batch_moments(const GroupAdvantagesArgs& args, const Value& value) {
  double count = 0.0, sum = 0.0, squares = 0.0;
  for (int64_t sample = threadIdx.x; sample < args.batch; sample += kThreads) {
    if (!in_a_group(args, sample)) continue;
    count += 1.0;
    sum += value(sample);
  }
  count = block_mean(count, 1.0);
  const double mean = block_mean(sum, count);
  for (int64_t sample = threadIdx.x; sample < args.batch; sample += kThreads) {
    if (!in_a_group(args, sample)) continue;
    const double distance = value(sample) - mean;
    squares += distance * distance;
  }
  return {mean, sqrt(block_mean(squares, count))};
}

// One block a column. Small grids: with at least 1 block on a multiprocessor asked for, the compiler spills nothing.
__global__ void __launch_bounds__(kThreads, 1) batch_std_kernel(const __grid_constant__ GroupAdvantagesArgs args) {
  const int column = static_cast<int>(blockIdx.x);
  const auto value = [&](int64_t sample) { return column_value(args, sample, column); };
  const double std = batch_moments(args, value).divisor;
  if (threadIdx.x == 0) args.batch_std[column] = std;
}

struct Members {
  const int64_t* sample;
  int64_t count;
};

// Writes the samples of this block's group, in the order of the batch, behind those of the groups before it.
__device__ __forceinline__ Members list_members(const GroupAdvantagesArgs& args, int64_t group) {
  __shared__ int found[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double before = 0.0;
  for (int64_t sample = threadIdx.x; sample < args.batch; sample += kThreads) {
    before += args.group_id[sample] >= 0 && args.group_id[sample] < group ? 1.0 : 0.0;
  }
  int64_t* members = args.members + static_cast<int64_t>(block_mean(before, 1.0));
  int64_t count = 0;
  for (int64_t start = 0; start < args.batch; start += kThreads) {
    const int64_t sample = start + threadIdx.x;
    const bool is_member = sample < args.batch && args.group_id[sample] == group;
    const unsigned mask = __ballot_sync(kAllLanes, is_member);
    if (lane == 0) found[warp] = count_bits(mask);
    __syncthreads();
    int64_t place = count + count_bits(mask & ((1u << lane) - 1u));
    for (int i = 0; i < kThreads / kWarp; ++i) {
      place += i < warp ? found[i] : 0;
      count += found[i];
    }
    if (is_member) members[place] = sample;
    __syncthreads();
  }
  return {members, count};
}

// Mean, formed around the group's first value, and population standard deviation of a column, by one warp: lane l takes
// members l, l + 32, ...
__device__ __forceinline__ Scale group_moments(const GroupAdvantagesArgs& args, const Members& members, int column) {
  const double size = static_cast<double>(members.count);
  const double first = column_value(args, members.sample[0], column);
  double sum = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < members.count; i += kWarp) {
    sum += column_value(args, members.sample[i], column) - first;
  }
  const double mean = first + __shfl_sync(kAllLanes, warp_sum(sum), 0) / size;
  for (int64_t i = threadIdx.x % kWarp; i < members.count; i += kWarp) {
    const double distance = column_value(args, members.sample[i], column) - mean;
    squares += distance * distance;
  }
  return {mean, sqrt(__shfl_sync(kAllLanes, warp_sum(squares), 0) / size)};
}

// One block a group, one warp a column.
__global__ void __launch_bounds__(kThreads, 1)
    group_advantages_kernel(const __grid_constant__ GroupAdvantagesArgs args) {
  __shared__ Scale scales[kMaxRewards];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t sample = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; sample < args.batch;
       sample += stride) {
    if (!in_a_group(args, sample)) poison(args, sample);
  }
  const Members members = list_members(args, blockIdx.x);
  if (members.count == 0) return;
  for (int column = threadIdx.x / kWarp; column < num_columns(args); column += kThreads / kWarp) {
    Scale scale = group_moments(args, members, column);
    if (args.batch_scale) scale.divisor = args.batch_std[column];
    scale.divisor += args.eps;
    if (threadIdx.x % kWarp == 0) scales[column] = scale;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < members.count; i += kThreads) {
    const int64_t sample = members.sample[i];
    store_sample(args, sample, scales, [&](int column) { return column_value(args, sample, column); });
  }
}

// One block. The last z-score of kGdpo.
__global__ void __launch_bounds__(kThreads, 1) gdpo_kernel(const __grid_constant__ GroupAdvantagesArgs args) {
  Scale scale = batch_moments(args, [&](int64_t sample) { return args.combined[sample]; });
  scale.divisor += args.eps;
  for (int64_t sample = threadIdx.x; sample < args.batch; sample += kThreads) {
    if (!in_a_group(args, sample)) continue;
    store_real(args.advantages, sample, clipped(args, z_score(args.combined[sample], scale)));
  }
}

// How the other candidates of a prompt lie to one: so many higher, so many lower, so many equal with a lower index.
struct Standing {
  int above, below, ties;
};

__device__ __forceinline__ Standing standing_of(const int64_t* keys, int candidates, int index) {
  Standing standing{};
  for (int i = 0; i < candidates; ++i) {
    standing.above += keys[i] > keys[index];
    standing.below += keys[i] < keys[index];
    standing.ties += i < index && keys[i] == keys[index];
  }
  return standing;
}

// Place among the num_top highest, highest first, then the num_bottom lowest of the others, lowest first; or -1.
__device__ __forceinline__ int place_of(const Standing& standing, int num_top, int num_bottom) {
  const int from_top = standing.above + standing.ties;
  if (from_top < num_top) return from_top;
  const int taken_ties = num_top > standing.above ? num_top - standing.above : 0;
  const int from_bottom = standing.below + standing.ties - taken_ties;
  return from_bottom < num_bottom ? num_top + from_bottom : -1;
}

// One block a prompt.
__global__ void __launch_bounds__(kThreads) select_kernel(const __grid_constant__ SelectArgs args) {
  __shared__ int64_t keys[kMaxCandidates];
  __shared__ double sorted[kMaxCandidates];
  __shared__ bool is_taken[kMaxCandidates];
  __shared__ int found_bottom;
  const int candidates = args.candidates, size = args.num_top + args.num_bottom;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * candidates;
  int64_t* taken = args.indices + static_cast<int64_t>(blockIdx.x) * size;
  for (int i = threadIdx.x; i < candidates; i += kThreads) keys[i] = order_key(real_at(args.rewards, row + i));
  __syncthreads();
  if (!args.best_variance) {
    for (int i = threadIdx.x; i < candidates; i += kThreads) {
      const int place = place_of(standing_of(keys, candidates, i), args.num_top, args.num_bottom);
      if (place >= 0) taken[place] = i;
    }
    return;
  }
  Standing standings[kMaxCandidates / kThreads];
#pragma unroll
  for (int turn = 0; turn < kMaxCandidates / kThreads; ++turn) {
    const int i = turn * kThreads + static_cast<int>(threadIdx.x);
    if (i >= candidates) continue;
    standings[turn] = standing_of(keys, candidates, i);
    sorted[standings[turn].below + standings[turn].ties] = real_at(args.rewards, row + i);
  }
  __syncthreads();
  if (threadIdx.x == 0) found_bottom = best_num_bottom(sorted, candidates, size);
  __syncthreads();
#pragma unroll
  for (int turn = 0; turn < kMaxCandidates / kThreads; ++turn) {
    const int i = turn * kThreads + static_cast<int>(threadIdx.x);
    if (i < candidates) is_taken[i] = place_of(standings[turn], size - found_bottom, found_bottom) >= 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < candidates; i += kThreads) {
    if (!is_taken[i]) continue;
    int place = 0;
    for (int other = 0; other < i; ++other) place += is_taken[other];
    taken[place] = i;
  }
}

// Bit i of the result: sample i dominates `sample`, at least as high in every objective and higher in one.
__device__ __forceinline__ uint64_t dominators(const int64_t (*keys)[kMaxObjectives], const ParetoFrontsArgs& args,
                                               int sample) {
  uint64_t mask = 0;
  for (int i = 0; i < args.candidates; ++i) {
    bool lower = false, higher = false;
    for (int k = 0; k < args.num_objectives; ++k) {
      lower |= keys[i][k] < keys[sample][k];
      higher |= keys[i][k] > keys[sample][k];
    }
    mask |= static_cast<uint64_t>(higher && !lower) << i;
  }
  return mask;
}

// One warp a prompt; lane l has samples l and l + 32.
__global__ void __launch_bounds__(kWarp) pareto_fronts_kernel(const __grid_constant__ ParetoFrontsArgs args) {
  __shared__ int64_t keys[kMaxFront][kMaxObjectives];
  const int count = args.candidates, low = threadIdx.x, high = low + kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * count;
  for (int i = low; i < count * args.num_objectives; i += kWarp) {
    keys[i / args.num_objectives][i % args.num_objectives] =
        order_key(real_at(args.objectives, row * args.num_objectives + i));
  }
  __syncwarp();
  const uint64_t above_low = low < count ? dominators(keys, args, low) : 0;
  const uint64_t above_high = high < count ? dominators(keys, args, high) : 0;
  uint64_t left = ~uint64_t{0} >> (kMaxFront - count);
  for (int64_t front = 0; left; ++front) {
    const bool peel_low = (left >> low & 1) && !(above_low & left);
    const bool peel_high = (left >> high & 1) && !(above_high & left);
    if (peel_low) args.fronts[row + low] = front;
    if (peel_high) args.fronts[row + high] = front;
    const uint64_t low_half = __ballot_sync(kAllLanes, peel_low), high_half = __ballot_sync(kAllLanes, peel_high);
    left &= ~(low_half | high_half << kWarp);
  }
}

// The units of one block: each thread has four, loaded before the first is stored.
template <typename Unit>
__device__ __forceinline__ void gather_units(const CompactArgs& args, const Rows& rows, int64_t first) {
  constexpr int kEach = kUnits / kThreads;
  const int64_t width = rows.row_bytes / static_cast<int64_t>(sizeof(Unit)), total = args.num_indices * width;
  const int64_t first_row = first / width, first_column = first - first_row * width;
  Unit values[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int offset = k * kThreads + static_cast<int>(threadIdx.x);
    if (first + offset >= total) continue;
    int64_t row = first_row, column = first_column + offset;
    if (column >= width) {
      row += column / width;
      column %= width;
    }
    const int64_t source = clamped(args.indices[row], rows.num_rows);
    values[k] = reinterpret_cast<const Unit*>(rows.source)[source * width + column];
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t unit = first + k * kThreads + static_cast<int>(threadIdx.x);
    if (unit < total) reinterpret_cast<Unit*>(rows.target)[unit] = values[k];
  }
}

// A block gathers up to 1024 units of one buffer.
__global__ void __launch_bounds__(kThreads) compact_kernel(const __grid_constant__ CompactArgs args) {
  int buffer = args.num_buffers - 1;
  while (args.rows[buffer].first_block > blockIdx.x) --buffer;
  const Rows& rows = args.rows[buffer];
  const int64_t first = (blockIdx.x - rows.first_block) * kUnits;
  switch (rows.unit_bytes) {
    case 16:
      return gather_units<Bytes16>(args, rows, first);
    case 8:
      return gather_units<uint64_t>(args, rows, first);
    case 4:
      return gather_units<uint32_t>(args, rows, first);
    case 2:
      return gather_units<uint16_t>(args, rows, first);
    default:
      return gather_units<uint8_t>(args, rows, first);
  }
}

}  // namespace

void group_advantages(const GroupAdvantagesArgs& args, void* stream) {
  if (args.batch_scale) FLOWGRPO_LAUNCH(batch_std_kernel, num_columns(args), kThreads, stream, args);
  FLOWGRPO_LAUNCH(group_advantages_kernel, args.num_groups, kThreads, stream, args);
  if (args.aggregate == Aggregate::kGdpo) FLOWGRPO_LAUNCH(gdpo_kernel, 1, kThreads, stream, args);
}

void select_samples(const SelectArgs& args, void* stream) {
  FLOWGRPO_LAUNCH(select_kernel, args.prompts, kThreads, stream, args);
}

void pareto_fronts(const ParetoFrontsArgs& args, void* stream) {
  FLOWGRPO_LAUNCH(pareto_fronts_kernel, args.prompts, kWarp, stream, args);
}

void compact(const CompactArgs& given, void* stream) {
  CompactArgs args = given;
  int64_t num_blocks = 0;
  for (int i = 0; i < args.num_buffers; ++i) {
    Rows& rows = args.rows[i];
    const uintptr_t places = reinterpret_cast<uintptr_t>(rows.source) | reinterpret_cast<uintptr_t>(rows.target) |
                             static_cast<uintptr_t>(rows.row_bytes);
    rows.unit_bytes = kMaxUnitBytes;
    while (places % static_cast<uintptr_t>(rows.unit_bytes)) rows.unit_bytes /= 2;
    rows.first_block = num_blocks;
    num_blocks += (args.num_indices * (rows.row_bytes / rows.unit_bytes) + kUnits - 1) / kUnits;
  }
  FLOWGRPO_LAUNCH(compact_kernel, num_blocks, kThreads, stream, args);
}

}  // namespace flowgrpo_fast::cuda
