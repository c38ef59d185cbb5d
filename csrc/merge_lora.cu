// Merging a LoRA into a weight and quantising it on a GPU: a block takes four rows, so that a value of lora_a is read
// once for four products. Products are plain multiplications and additions in the CPU's order.
#include "quantize.cuh"

namespace flowgrpo_fast::cuda {
namespace {

constexpr int kRows = 4;
constexpr int64_t kKept = 2752;  // columns of merged rows that fit into shared memory

__device__ __forceinline__ float load_value(const Buffer& buffer, int64_t offset) {
  if (buffer.dtype == DType::kFloat32) return static_cast<const float*>(buffer.data)[offset];
  const uint16_t stored = static_cast<const uint16_t*>(buffer.data)[offset];
  return buffer.dtype == DType::kBFloat16 ? bfloat16_to_float(stored) : float16_to_float(stored);
}

// Rows [first, first + kRows) of lora_b, zeros past the last. A barrier comes before and after.
__device__ __forceinline__ void load_factors(const Matrix& matrix, int64_t first, float* factors) {
  __syncthreads();
  const int64_t count = kRows * matrix.rank;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const bool real = first + i / matrix.rank < matrix.rows;
    factors[i] = real ? load_value(matrix.lora_b, first * matrix.rank + i) : 0.0f;
  }
  __syncthreads();
}

// A group of columns of the merged rows; zeros past the last column.
__device__ __forceinline__ void merge_group(const Matrix& matrix, const float* factors, int64_t first, int64_t element,
                                            bool vector, float (*merged)[kGroup]) {
  const int rank = static_cast<int>(matrix.rank);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) merged[row][i] = 0.0f;
  }
  for (int j = 0; j < rank; ++j) {
    float lora_a[kGroup];
    load_group(matrix.lora_a, group_of_row(j, element, matrix.columns, vector), lora_a);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float factor = factors[row * rank + j];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) merged[row][i] += factor * lora_a[i];
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    float weight[kGroup] = {};
    const Group group = group_of_row(first + row, element, matrix.columns, vector);
    if (first + row < matrix.rows) load_group(matrix.values, group, weight);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      merged[row][i] = i < group.count ? weight[i] + matrix.lora_scale * merged[row][i] : 0.0f;
    }
  }
}

// Merged columns that fit are kept for the second pass, the rest is merged again. A thread keeps its own groups.
__global__ void __launch_bounds__(kThreads)
    merge_fp8_kernel(const __grid_constant__ QuantizeFp8Args args, bool vector) {
  __shared__ float factors[kRows * kMaxRank];
  alignas(16) __shared__ float kept[kRows * kKept];
  const Matrix& matrix = args.matrix;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  alignas(16) float merged[kRows][kGroup];
  int32_t largest[kRows] = {};
  load_factors(matrix, first, factors);
  for (int64_t element = threadIdx.x * kGroup; element < matrix.columns; element += kThreads * kGroup) {
    merge_group(matrix, factors, first, element, vector, merged);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      largest[row] = larger(largest[row], group_max(merged[row]));
      if (element < kKept) copy_vector<sizeof merged[row]>(kept + row * kKept + element, merged[row]);
    }
  }
  float scale[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) scale[row] = fp8_scale(as_float(row_max<kThreads>(largest[row])));
  for (int64_t element = threadIdx.x * kGroup; element < matrix.columns; element += kThreads * kGroup) {
    if (element >= kKept) merge_group(matrix, factors, first, element, vector, merged);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (element < kKept) copy_vector<sizeof merged[row]>(merged[row], kept + row * kKept + element);
      const Group group = group_of_row(first + row, element, matrix.columns, vector);
      if (first + row < matrix.rows) store_fp8_group(args.codes, group, merged[row], scale[row]);
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    if (threadIdx.x == 0 && first + row < matrix.rows) args.scale[first + row] = scale[row];
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_amax_kernel(const __grid_constant__ QuantizeNvfp4Args args, bool vector) {
  __shared__ float factors[kRows * kMaxRank];
  const Matrix& matrix = args.matrix;
  int32_t largest = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < matrix.rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    load_factors(matrix, first, factors);
    for (int64_t element = threadIdx.x * kGroup; element < matrix.columns; element += kThreads * kGroup) {
      float merged[kRows][kGroup];
      merge_group(matrix, factors, first, element, vector, merged);
#pragma unroll
      for (int row = 0; row < kRows; ++row) largest = larger(largest, group_max(merged[row]));
    }
  }
  largest = row_max<kThreads>(largest);
  if (threadIdx.x == 0) args.partials[blockIdx.x] = as_float(largest);
}

__global__ void __launch_bounds__(kThreads)
    merge_nvfp4_kernel(const __grid_constant__ QuantizeNvfp4Args args, bool vector) {
  __shared__ float factors[kRows * kMaxRank];
  const Matrix& matrix = args.matrix;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const float global_scale = *args.global_scale;
  const int64_t padded = args.scale_columns * kBlockSize;
  load_factors(matrix, first, factors);
  for (int64_t start = 0; start < padded; start += kThreads * kGroup) {
    const int64_t element = start + threadIdx.x * kGroup;
    float merged[kRows][kGroup] = {};
    const bool inside = element < matrix.columns;
    if (inside) merge_group(matrix, factors, first, element, vector, merged);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const bool real = inside && first + row < matrix.rows;
      if (first + row < args.scale_rows) {
        store_nvfp4_group(args, first + row, element, merged[row], global_scale, real);
      }
    }
  }
}

int64_t groups_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

}  // namespace

void merge_quantize_fp8_rows(const QuantizeFp8Args& args, void* stream) {
  const bool vector = can_vectorize(args.matrix) && aligned8(args.codes);
  FLOWGRPO_LAUNCH(merge_fp8_kernel, groups_of(args.matrix.rows), kThreads, stream, args, vector);
}

void merge_quantize_nvfp4(const QuantizeNvfp4Args& args, void* stream) {
  const bool vector = can_vectorize(args.matrix);
  if (!args.is_static) {
    const int64_t groups = groups_of(args.matrix.rows);
    const int64_t num_blocks = groups < kMaxPartials ? groups : kMaxPartials;
    FLOWGRPO_LAUNCH(merge_amax_kernel, num_blocks, kThreads, stream, args, vector);
    FLOWGRPO_LAUNCH(nvfp4_global_scale_kernel, 1, kThreads, stream, args.partials, num_blocks, args.global_scale);
  }
  FLOWGRPO_LAUNCH(merge_nvfp4_kernel, groups_of(args.scale_rows), kThreads, stream, args, vector);
}

}  // namespace flowgrpo_fast::cuda
