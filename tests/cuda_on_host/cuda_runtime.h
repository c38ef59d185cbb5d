// Stands in for the CUDA runtime where g++ compiles the .cu sources: the words of CUDA C++ the kernels use, and a
// launch that runs them on the host, see block.h. Anything else CUDA has does not compile here.
#pragma once

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // blocks run one after another

#define FLOWGRPO_KERNEL(kernel, num_blocks, num_threads, stream) \
  ::cuda_on_host::launch_of(#kernel, kernel, num_blocks, num_threads, stream)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline cudaError_t cudaGetLastError() {
  return cuda_on_host::take_failure() ? cudaErrorInvalidConfiguration : cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// Of the running thread; grids and blocks have one dimension here.
using cuda_on_host::blockDim;
using cuda_on_host::blockIdx;
using cuda_on_host::gridDim;
using cuda_on_host::threadIdx;

inline void __syncthreads() { cuda_on_host::wait_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_host::wait_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_host::shuffle(mask, value, lane % 32);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() ^ distance);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() + distance);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() - distance);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) { return cuda_on_host::ballot(mask, predicate); }
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
