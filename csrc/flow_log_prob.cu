// flow_log_prob and its backward on a GPU.
#include "cuda_group.cuh"

namespace flowgrpo_fast::cuda {
namespace {

constexpr int kMapThreads = 64;  // few, so that small latents still fill the GPU
constexpr int kLanes = 8;        // threads that share a position when channels come last

__host__ __device__ __forceinline__ int64_t map_blocks(const PositionMap& map) {
  return (map.positions + kMapThreads * kGroup - 1) / (kMapThreads * kGroup);
}

// The velocity a drift is taken from.
template <typename Real>
__device__ __forceinline__ void load_reference(const Reference& reference, Real scale, const Group& group,
                                               Real* velocity) {
  load_group(reference.velocity, group, velocity);
  if (!reference.negative.data) return;
  Real negative[kGroup];
  load_group(reference.negative, group, negative);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) velocity[i] = guided(velocity[i], negative[i], scale);
}

// Extras are compiled apart: their registers would cost the plain replay its occupancy.
template <typename Real, bool kExtra>
__global__ void __launch_bounds__(kThreads)
    flow_log_prob_kernel(const __grid_constant__ FlowLogProbArgs args, bool vector) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const bool with_drift = kExtra && args.reference.velocity.data;
  Real sum = 0, drift_sum = 0;
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, transition.elements, vector);
    MeanGroup<Real> tile;
    Real next[kGroup];
    mean_group(transition, row, group, &tile);
    load_group(args.next_latents, group, next);
    sum += squared_distance(next, tile.mean, group.count);
    if (kExtra && args.mean) store_group(real_buffer<Real>(args.mean), group, tile.mean);
    if (with_drift) {
      Real reference[kGroup];
      load_reference(args.reference, static_cast<Real>(transition.guidance_scale), group, reference);
      drift_sum += squared_distance(tile.velocity, reference, group.count);
    }
  }
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) args.partials[blockIdx.x] = total;
  if (!with_drift) return;
  __syncthreads();  // block_sum's shared sums are read before they are written again
  const double drift_total = block_sum(static_cast<double>(drift_sum));
  if (threadIdx.x == 0) args.drift_partials[blockIdx.x] = drift_total;
}

// The ordered sum of log_prob_kernel, for the drift.
template <typename Real>
__global__ void drift_kernel(const __grid_constant__ Transition transition, const double* partials, Real* drift) {
  const int64_t sample = blockIdx.x;
  const int64_t chunks = num_chunks(transition.elements);
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWarp) sum += partials[sample * chunks + chunk];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    const Row<Real> row = row_of<Real>(transition, sample);
    drift[sample] = static_cast<Real>(drift_of(row, sum, transition.elements));
  }
}

// Channels first: a thread sums eight neighbouring positions, channel after channel.
template <typename Real>
__global__ void __launch_bounds__(kMapThreads) map_kernel(const __grid_constant__ FlowLogProbArgs args, bool vector) {
  const Transition& transition = args.transition;
  const int64_t positions = args.map.positions, blocks = map_blocks(args.map);
  const int64_t sample = blockIdx.x / blocks;
  const int64_t first = ((blockIdx.x % blocks) * kMapThreads + threadIdx.x) * kGroup;
  if (first >= positions) return;
  const int count = static_cast<int>(positions - first < kGroup ? positions - first : kGroup);
  const Row<Real> row = row_of<Real>(transition, sample);
  Real sums[kGroup] = {}, next[kGroup];
  for (int64_t channel = 0; channel < args.map.channels; ++channel) {
    const int64_t element = channel * positions + first;
    const Group group = {element, sample * transition.elements + element, count, vector};
    MeanGroup<Real> tile;
    mean_group(transition, row, group, &tile);
    load_group(args.next_latents, group, next);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Real distance = next[i] - tile.mean[i];
      sums[i] += distance * distance;
    }
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    sums[i] = static_cast<Real>(log_prob_of(row, static_cast<double>(sums[i]), args.map.channels));
  }
  store_group(real_buffer<Real>(args.map.data), {first, sample * positions + first, count, vector}, sums);
}

// Channels last: eight lanes share a position.
template <typename Real>
__global__ void __launch_bounds__(kThreads) map_last_kernel(const __grid_constant__ FlowLogProbArgs args, bool vector) {
  const Transition& transition = args.transition;
  const int64_t channels = args.map.channels, positions = args.map.positions;
  const int lane = threadIdx.x % kLanes;
  const int64_t place = blockIdx.x * static_cast<int64_t>(kThreads / kLanes) + threadIdx.x / kLanes;
  const bool inside = place < transition.batch * positions;
  const int64_t sample = inside ? place / positions : 0;
  const Row<Real> row = row_of<Real>(transition, sample);
  double sum = 0.0;
  for (int64_t channel = lane * kGroup; inside && channel < channels; channel += kLanes * kGroup) {
    const int64_t offset = place * channels + channel, left = channels - channel;
    const Group group = {offset - sample * transition.elements, offset, static_cast<int>(left < kGroup ? left : kGroup),
                         vector};
    MeanGroup<Real> tile;
    Real next[kGroup];
    mean_group(transition, row, group, &tile);
    load_group(args.next_latents, group, next);
    sum += static_cast<double>(squared_distance(next, tile.mean, group.count));
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffffu, sum, distance);
  if (inside && lane == 0)
    static_cast<Real*>(args.map.data)[place] = static_cast<Real>(log_prob_of(row, sum, channels));
}

// The value of the map at an element.
template <typename Real>
__device__ __forceinline__ Real at_position(const PositionMap& map, int64_t sample, int64_t element) {
  const int64_t position = map.channels_last ? element / map.channels : element % map.positions;
  return static_cast<const Real*>(map.data)[sample * map.positions + position];
}

// Adds the gradients of the mean, the drift and the map to that of the log-probability.
template <typename Real>
__device__ __forceinline__ void add_extras(const FlowLogProbBackwardArgs& args, const Row<Real>& row, int64_t sample,
                                           const Group& group, const MeanGroup<Real>& tile, const Real* next,
                                           Real* gradient) {
  const Transition& transition = args.transition;
  if (args.grad_mean) {
    Real grad_mean[kGroup];
    load_group(real_buffer<Real>(args.grad_mean), group, grad_mean);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient[i] += row.b * grad_mean[i];
  }
  if (args.grad_drift) {
    const double incoming = static_cast<double>(static_cast<const Real*>(args.grad_drift)[sample]);
    const Real factor = drift_scale(row, incoming, transition.elements);
    Real reference[kGroup];
    load_reference(args.reference, static_cast<Real>(transition.guidance_scale), group, reference);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient[i] += factor * (tile.velocity[i] - reference[i]);
  }
  if (args.grad_map.data) {
    const Real factor = backward_scale(row, 1.0, args.grad_map.channels);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i >= group.count) continue;
      const Real incoming = at_position<Real>(args.grad_map, sample, group.element + i);
      gradient[i] += factor * incoming * (next[i] - tile.mean[i]);
    }
  }
}

template <typename Real>
__device__ __forceinline__ void store_gradient(const Buffer& target, const Group& group, const Real* gradient,
                                               Real scale) {
  Real scaled[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) scaled[i] = scale * gradient[i];
  store_group(target, group, scaled);
}

template <typename Real, bool kExtra>
__global__ void __launch_bounds__(kThreads)
    flow_log_prob_backward_kernel(const __grid_constant__ FlowLogProbBackwardArgs args, bool vector) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const Real* grad_log_prob = static_cast<const Real*>(args.grad_log_prob);
  const double incoming = grad_log_prob ? static_cast<double>(grad_log_prob[range.sample]) : 0.0;
  const Real factor = backward_scale(row, incoming, transition.elements);
  const Real scale = static_cast<Real>(transition.guidance_scale), one = 1;
  const bool guidance = transition.negative_velocity.data != nullptr;
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, transition.elements, vector);
    MeanGroup<Real> tile;
    Real next[kGroup], gradient[kGroup];
    mean_group(transition, row, group, &tile);
    load_group(args.next_latents, group, next);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient[i] = factor * (next[i] - tile.mean[i]);
    if (kExtra) add_extras(args, row, range.sample, group, tile, next, gradient);
    if (args.grad_velocity.data) store_gradient(args.grad_velocity, group, gradient, guidance ? scale : one);
    if (args.grad_negative.data) store_gradient(args.grad_negative, group, gradient, one - scale);
  }
}

bool is_aligned(const Reference& reference) {
  return aligned16(reference.velocity.data) && aligned16(reference.negative.data);
}

template <typename Real>
void launch_map(const FlowLogProbArgs& args, bool vector, void* stream) {
  const PositionMap& map = args.map;
  if (map.channels_last) {
    const int64_t num_blocks = (args.transition.batch * map.positions * kLanes + kThreads - 1) / kThreads;
    FLOWGRPO_LAUNCH(map_last_kernel<Real>, num_blocks, kThreads, stream, args, vector && map.channels % kGroup == 0);
  } else {
    const bool whole = map.positions % kGroup == 0 && aligned16(map.data);
    FLOWGRPO_LAUNCH(map_kernel<Real>, args.transition.batch * map_blocks(map), kMapThreads, stream, args,
                    vector && whole);
  }
}

template <typename Real>
void launch(const FlowLogProbArgs& args, void* stream) {
  const Transition& transition = args.transition;
  const bool vector = can_vectorize(transition) && aligned16(args.next_latents.data) && aligned16(args.mean) &&
                      is_aligned(args.reference);
  const int64_t num_blocks = transition.batch * num_chunks(transition.elements);
  const bool extra = args.mean || args.reference.velocity.data;
  const auto replay_kernel = extra ? flow_log_prob_kernel<Real, true> : flow_log_prob_kernel<Real, false>;
  FLOWGRPO_LAUNCH(replay_kernel, num_blocks, kThreads, stream, args, vector);
  FLOWGRPO_LAUNCH(log_prob_kernel<Real>, transition.batch, kWarp, stream, transition, args.partials,
                  static_cast<Real*>(args.log_prob));
  if (args.reference.velocity.data) {
    FLOWGRPO_LAUNCH(drift_kernel<Real>, transition.batch, kWarp, stream, transition, args.drift_partials,
                    static_cast<Real*>(args.drift));
  }
  if (args.map.data) launch_map<Real>(args, vector, stream);
}

template <typename Real>
void launch_backward(const FlowLogProbBackwardArgs& args, void* stream) {
  const Transition& transition = args.transition;
  const bool vector = can_vectorize(transition) && aligned16(args.next_latents.data) && aligned16(args.grad_mean) &&
                      is_aligned(args.reference) && aligned16(args.grad_velocity.data) &&
                      aligned16(args.grad_negative.data);
  const int64_t num_blocks = transition.batch * num_chunks(transition.elements);
  const bool extra = args.grad_mean || args.grad_drift || args.grad_map.data;
  const auto gradient_kernel =
      extra ? flow_log_prob_backward_kernel<Real, true> : flow_log_prob_backward_kernel<Real, false>;
  FLOWGRPO_LAUNCH(gradient_kernel, num_blocks, kThreads, stream, args, vector);
}

}  // namespace

void flow_log_prob(const FlowLogProbArgs& args, void* stream) {
  args.transition.latents.dtype == DType::kFloat64 ? launch<double>(args, stream) : launch<float>(args, stream);
}

void flow_log_prob_backward(const FlowLogProbBackwardArgs& args, void* stream) {
  const bool is_double = args.transition.latents.dtype == DType::kFloat64;
  is_double ? launch_backward<double>(args, stream) : launch_backward<float>(args, stream);
}

}  // namespace flowgrpo_fast::cuda
