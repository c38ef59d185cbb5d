// Launching a kernel.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

// nvcc's syntax, unless <cuda_runtime.h> brings a launch of its own (tests/cuda_on_host).
#ifndef FLOWGRPO_KERNEL
#define FLOWGRPO_KERNEL(kernel, num_blocks, num_threads, stream) kernel<<<num_blocks, num_threads, 0, stream>>>
#endif

// The one place that launches a kernel.
#define FLOWGRPO_LAUNCH(kernel, num_blocks, num_threads, stream, ...)                                              \
  do {                                                                                                             \
    FLOWGRPO_KERNEL(kernel, ::flowgrpo_fast::cuda::checked_count(#kernel, "blocks", num_blocks), num_threads,      \
                    static_cast<cudaStream_t>(stream))(__VA_ARGS__);                                               \
    const cudaError_t flowgrpo_status = cudaGetLastError();                                                        \
    if (flowgrpo_status != cudaSuccess) {                                                                          \
      throw std::runtime_error(std::string("flowgrpo_fast: " #kernel ": ") + cudaGetErrorString(flowgrpo_status)); \
    }                                                                                                              \
  } while (false)

namespace flowgrpo_fast::cuda {

// What a kernel counts in 32 bits. A std::invalid_argument is a ValueError in Python.
inline unsigned checked_count(const char* kernel, const char* what, int64_t count) {
  if (count > 0x7fffffffLL) {
    throw std::invalid_argument("flowgrpo_fast: " + std::string(kernel) + " has " + std::to_string(count) + " " + what +
                                ", must have at most 2147483647: split the batch");
  }
  return static_cast<unsigned>(count);
}

}  // namespace flowgrpo_fast::cuda
