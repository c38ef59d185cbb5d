// Sums in a fixed order: a block's sum depends on its 256 values only, never on timing.
#pragma once

#include "flow_step.h"
#include "launch.cuh"

namespace flowgrpo_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  return value;
}

// Sum over the block, valid in thread 0.
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / kWarp];
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

// One warp a sample: lane l adds partials l, l + 32, ..., then the lanes are added as a tree.
template <typename Real>
static __global__ void log_prob_kernel(const __grid_constant__ Transition transition, const double* partials,
                                       Real* log_prob) {
  const int64_t sample = blockIdx.x;
  const int64_t chunks = num_chunks(transition.elements);
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWarp) sum += partials[sample * chunks + chunk];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    const Row<Real> row = row_of<Real>(transition, sample);
    log_prob[sample] = static_cast<Real>(log_prob_of(row, sum, transition.elements));
  }
}

}  // namespace flowgrpo_fast::cuda
