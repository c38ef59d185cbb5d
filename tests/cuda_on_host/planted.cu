// Kernels with a defect each, to see that the shim and the sanitizers find it, and the same kernels without.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

namespace {

constexpr int kThreads = 64;

// Reverses the values of a block through shared memory.
template <bool kBarrier>
__global__ void __launch_bounds__(kThreads) reverse(int* values) {
  __shared__ int kept[kThreads];
  kept[threadIdx.x] = values[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) __syncthreads();
  values[blockIdx.x * kThreads + threadIdx.x] = kept[kThreads - 1 - threadIdx.x];
}

// Reads what another lane wrote; the shuffle in between orders nothing.
template <bool kBarrier>
__global__ void neighbour(int* values) {
  __shared__ int kept[kThreads];
  kept[threadIdx.x] = values[threadIdx.x];
  const int own = __shfl_xor_sync(0xffffffffu, kept[threadIdx.x], 1);
  if (kBarrier) __syncwarp();
  values[threadIdx.x] = own == kept[threadIdx.x ^ 1] ? own : -1;
}

// All threads of a block write `value` places on.
__global__ void shifted(int* values, int shift) {
  __shared__ int kept[kThreads];
  kept[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x + static_cast<unsigned>(shift)] = kept[threadIdx.x];
}

__global__ void shifted_shared(int* values, int shift) {
  __shared__ int kept[kThreads];
  kept[threadIdx.x + static_cast<unsigned>(shift)] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = kept[threadIdx.x];
}

__global__ void shifted_bits(int* values, int shift) { values[threadIdx.x] = 1 << shift; }

// Threads from `count` on never come to the barrier.
__global__ void leaves_early(int count) {
  if (static_cast<int>(threadIdx.x) >= count) return;
  __syncthreads();
}

__global__ void half_a_warp(int* values) {
  if (threadIdx.x % 32 < 16) values[threadIdx.x] = __shfl_xor_sync(0xffffffffu, values[threadIdx.x], 1);
}

__global__ void two_operations(int* values) {
  values[threadIdx.x] = threadIdx.x % 2 ? __any_sync(0xffffffffu, true) : __shfl_sync(0xffffffffu, 1, 0);
}

template <typename... Parameters, typename... Arguments>
void launch(int num_blocks, int num_threads, void (*kernel)(Parameters...), Arguments... arguments) {
  FLOWGRPO_KERNEL(kernel, static_cast<unsigned>(num_blocks), static_cast<unsigned>(num_threads), nullptr)(arguments...);
  if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("refused");
}

void run(const std::string& name) {
  const std::unique_ptr<int[]> values(new int[2 * kThreads]);
  int* second = values.get() + kThreads;  // the last block of the allocation
  for (int i = 0; i < 2 * kThreads; ++i) values[i] = i;
  if (name == "reverse") launch(2, kThreads, reverse<true>, values.get());
  if (name == "reverse without barrier") launch(2, kThreads, reverse<false>, values.get());
  if (name == "neighbour") launch(1, kThreads, neighbour<true>, values.get());
  if (name == "neighbour without barrier") launch(1, kThreads, neighbour<false>, values.get());
  if (name == "inside") launch(1, kThreads, shifted, second, 0);
  if (name == "outside") launch(1, kThreads, shifted, second, 1);
  if (name == "outside shared") launch(1, kThreads, shifted_shared, second, 1);
  if (name == "undefined shift") launch(1, kThreads, shifted_bits, second, 40);
  if (name == "all stay") launch(1, kThreads, leaves_early, kThreads);
  if (name == "one leaves") launch(1, kThreads, leaves_early, kThreads - 1);
  if (name == "half a warp") launch(1, kThreads, half_a_warp, second);
  if (name == "two operations") launch(1, kThreads, two_operations, second);
  if (name == "no blocks") launch(0, kThreads, leaves_early, kThreads);
  launch(1, 2 * kThreads, leaves_early, 2 * kThreads);  // the shim goes on after a failure
  for (int i = 0; i < 2 * kThreads; ++i) printf("%d ", values[i]);
}

}  // namespace

int main(int, char** arguments) {
  try {
    run(arguments[1]);
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    launch(1, 2 * kThreads, leaves_early, 2 * kThreads);  // the shim works again
    return 1;
  }
  return 0;
}
