// flow_step on a GPU: one block a chunk of 4096 elements, then one warp a sample for the ordered sum.
#include "cuda_group.cuh"
#include "flow_step.h"

namespace flowgrpo_fast::cuda {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kThreads) flow_step_kernel(const __grid_constant__ FlowStepArgs args, bool vector) {
  const Transition& transition = args.transition;
  const ChunkRange range = chunk_range(transition.elements);
  const Row<Real> row = row_of<Real>(transition, range.sample);
  const PhiloxKey key = philox_key(args.seed[range.sample]);
  Real sum = 0;
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, transition.elements, vector);
    MeanGroup<Real> tile;
    Real noise[kGroup] = {}, next[kGroup];
    mean_group(transition, row, group, &tile);
    if (row.c != 0) normal_group(key, group, static_cast<uint32_t>(row.step), kStepStream, noise);
    if (args.x0_pred) {
      Real x0_pred[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) x0_pred[i] = tile.latents[i] - row.sigma * tile.velocity[i];
      store_group(real_buffer<Real>(args.x0_pred), group, x0_pred);
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) next[i] = tile.mean[i] + row.c * noise[i];
    store_group(args.next_latents, group, next);
    sum += squared_distance(next, tile.mean, group.count);
  }
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x == 0) args.partials[blockIdx.x] = total;
}

template <typename Real>
void launch(const FlowStepArgs& args, void* stream) {
  const Transition& transition = args.transition;
  const bool vector = can_vectorize(transition) && aligned16(args.next_latents.data) && aligned16(args.x0_pred);
  const int64_t num_blocks = transition.batch * num_chunks(transition.elements);
  FLOWGRPO_LAUNCH(flow_step_kernel<Real>, num_blocks, kThreads, stream, args, vector);
  FLOWGRPO_LAUNCH(log_prob_kernel<Real>, transition.batch, kWarp, stream, transition, args.partials,
                  static_cast<Real*>(args.log_prob));
}

}  // namespace

void flow_step(const FlowStepArgs& args, void* stream) {
  args.transition.latents.dtype == DType::kFloat64 ? launch<double>(args, stream) : launch<float>(args, stream);
}

}  // namespace flowgrpo_fast::cuda
