// Launching, and sums in a fixed order: a block's sum depends on its 256 values only, never on timing.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "flow_step.h"

namespace flowgrpo_fast::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// The one place that launches a kernel.
#define FLOWGRPO_LAUNCH(kernel, num_blocks, num_threads, stream, ...)                                               \
  do {                                                                                                              \
    kernel<<<::flowgrpo_fast::cuda::checked_grid(num_blocks), num_threads, 0, static_cast<cudaStream_t>(stream)>>>( \
        __VA_ARGS__);                                                                                               \
    const cudaError_t flowgrpo_status = cudaGetLastError();                                                         \
    if (flowgrpo_status != cudaSuccess) {                                                                           \
      throw std::runtime_error(std::string("flowgrpo_fast: " #kernel ": ") + cudaGetErrorString(flowgrpo_status));  \
    }                                                                                                               \
  } while (false)

inline unsigned checked_grid(int64_t num_blocks) {
  if (num_blocks > 0x7fffffffLL) throw std::runtime_error("flowgrpo_fast: too many elements for one CUDA launch");
  return static_cast<unsigned>(num_blocks);
}

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
