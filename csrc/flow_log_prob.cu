// flow_log_prob and its backward on a GPU.
#include "cuda_group.cuh"

namespace flowgrpo_fast::cuda {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kThreads)
    flow_log_prob_kernel(const __grid_constant__ FlowLogProbArgs args, bool vector) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  Real sum = 0;
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, transition.elements, vector);
    MeanGroup<Real> tile;
    Real next[kGroup];
    mean_group(transition, row, group, &tile);
    load_group(args.next_latents, group, next);
    sum += squared_distance(next, tile.mean, group.count);
    if (args.mean) store_group(real_buffer<Real>(args.mean), group, tile.mean);
  }
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) args.partials[blockIdx.x] = total;
}

template <typename Real>
__device__ __forceinline__ void store_gradient(const Buffer& target, const Group& group, const Real* gradient,
                                               Real scale) {
  Real scaled[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) scaled[i] = scale * gradient[i];
  store_group(target, group, scaled);
}

template <typename Real>
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
    if (args.grad_mean) {
      Real grad_mean[kGroup];
      load_group(real_buffer<Real>(args.grad_mean), group, grad_mean);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) gradient[i] += row.b * grad_mean[i];
    }
    if (args.grad_velocity.data) store_gradient(args.grad_velocity, group, gradient, guidance ? scale : one);
    if (args.grad_negative.data) store_gradient(args.grad_negative, group, gradient, one - scale);
  }
}

template <typename Real>
void launch(const FlowLogProbArgs& args, void* stream) {
  const Transition& transition = args.transition;
  const bool vector = can_vectorize(transition) && aligned16(args.next_latents.data) && aligned16(args.mean);
  const int64_t num_blocks = transition.batch * num_chunks(transition.elements);
  FLOWGRPO_LAUNCH(flow_log_prob_kernel<Real>, num_blocks, kThreads, stream, args, vector);
  FLOWGRPO_LAUNCH(log_prob_kernel<Real>, transition.batch, kWarp, stream, transition, args.partials,
                  static_cast<Real*>(args.log_prob));
}

template <typename Real>
void launch_backward(const FlowLogProbBackwardArgs& args, void* stream) {
  const Transition& transition = args.transition;
  const bool vector = can_vectorize(transition) && aligned16(args.next_latents.data) && aligned16(args.grad_mean) &&
                      aligned16(args.grad_velocity.data) && aligned16(args.grad_negative.data);
  const int64_t num_blocks = transition.batch * num_chunks(transition.elements);
  FLOWGRPO_LAUNCH(flow_log_prob_backward_kernel<Real>, num_blocks, kThreads, stream, args, vector);
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
