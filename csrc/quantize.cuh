// What the quantising kernels share. A thread works on eight neighbouring values of a row; a row belongs to a warp or,
// where it is long, to a block.
#pragma once

#include "cuda_group.cuh"
#include "quantize.h"

namespace flowgrpo_fast::cuda {

constexpr int64_t kShortRow = 1024;  // columns up to which a warp takes a row

// Rows [first_row, ...) with a LoRA, in merge_lora.cu.
void merge_quantize_fp8_rows(const QuantizeFp8Args& args, void* stream);
void merge_quantize_nvfp4(const QuantizeNvfp4Args& args, void* stream);

__device__ __forceinline__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

__device__ __forceinline__ float as_float(int32_t magnitude) { return float_of(static_cast<uint32_t>(magnitude)); }

// The group at `element` of a row; the caller has made sure that it starts inside.
__device__ __forceinline__ Group group_of_row(int64_t row, int64_t element, int64_t columns, bool vector) {
  const int64_t left = columns - element;
  return {element, row * columns + element, static_cast<int>(left < kGroup ? left : kGroup), vector};
}

__device__ __forceinline__ int32_t group_max(const float* values) {
  int32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) largest = larger(largest, magnitude_of(values[i]));
  return largest;
}

// Maximum over the threads of a row, valid in all of them.
template <int kRowThreads>
__device__ __forceinline__ int32_t row_max(int32_t value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = larger(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (kRowThreads == kWarp) return value;
  __shared__ int32_t warp_max[kThreads / kWarp];
  __syncthreads();  // the maximum before has been read
  if (threadIdx.x % kWarp == 0) warp_max[threadIdx.x / kWarp] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) value = larger(value, warp_max[warp]);
  return value;
}

__device__ __forceinline__ void store_fp8_group(uint8_t* codes, const Group& group, const float* values, float scale) {
  alignas(8) uint8_t rounded[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) rounded[i] = static_cast<uint8_t>(float_to_e4m3(values[i] / scale));
  uint8_t* target = codes + group.offset;
  if (group.vector) {
    *reinterpret_cast<uint64_t*>(target) = *reinterpret_cast<const uint64_t*>(rounded);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < group.count) target[i] = rounded[i];
    }
  }
}

// Quantises half a block. All threads of a warp call it, those of one block of values being neighbours; outside the
// matrix (not `real`) only the scale's padding is written.
__device__ __forceinline__ void store_nvfp4_group(const QuantizeNvfp4Args& args, int64_t row, int64_t element,
                                                  const float* values, float global_scale, bool real) {
  int32_t largest = group_max(values);
  largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  const int64_t block = element / kBlockSize;
  const uint32_t scale = nvfp4_scale(as_float(largest), global_scale);
  if (element % kBlockSize == 0 && block < args.scale_columns) {
    const int64_t place = scale_offset(row, block, args.scale_columns, args.swizzle);
    args.scales[place] = static_cast<uint8_t>(real ? scale : 0);
  }
  if (!real) return;
  const float reciprocal = nvfp4_reciprocal(scale, global_scale);
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) packed |= float_to_e2m1(values[i] * reciprocal) << (4 * i);
  uint8_t* target = args.codes + (row * args.matrix.columns + element) / 2;
  if (reinterpret_cast<uintptr_t>(target) % sizeof packed == 0) {
    *reinterpret_cast<uint32_t*>(target) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup / 2; ++i) target[i] = static_cast<uint8_t>(packed >> (8 * i));
  }
}

// The last of the two launches that find a matrix's largest magnitude.
static __global__ void __launch_bounds__(kThreads)
    nvfp4_global_scale_kernel(const float* partials, int64_t count, float* global_scale) {
  int32_t largest = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) largest = larger(largest, magnitude_of(partials[i]));
  largest = row_max<kThreads>(largest);
  if (threadIdx.x == 0) *global_scale = nvfp4_global_scale(as_float(largest));
}

inline bool aligned8(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 8 == 0; }

inline bool can_vectorize(const Matrix& matrix) {
  return matrix.columns % kGroup == 0 && aligned16(matrix.values.data) && aligned16(matrix.lora_a.data);
}

}  // namespace flowgrpo_fast::cuda
