// Quantising and dequantising on a GPU.
#include "quantize.cuh"

namespace flowgrpo_fast::cuda {
namespace {

// Reads the row twice; the second time it comes from the first-level cache.
template <int kRowThreads>
__global__ void __launch_bounds__(kThreads)
    quantize_fp8_kernel(const __grid_constant__ QuantizeFp8Args args, bool vector) {
  const Matrix& matrix = args.matrix;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  const int64_t first = threadIdx.x % kRowThreads * kGroup;
  if (row >= matrix.rows) return;
  float values[kGroup];
  int32_t largest = 0;
  for (int64_t element = first; element < matrix.columns; element += kRowThreads * kGroup) {
    load_group(matrix.values, group_of_row(row, element, matrix.columns, vector), values);
    largest = larger(largest, group_max(values));
  }
  const float scale = fp8_scale(as_float(row_max<kRowThreads>(largest)));
  for (int64_t element = first; element < matrix.columns; element += kRowThreads * kGroup) {
    const Group group = group_of_row(row, element, matrix.columns, vector);
    load_group(matrix.values, group, values);
    store_fp8_group(args.codes, group, values, scale);
  }
  if (first == 0) args.scale[row] = scale;
}

__global__ void __launch_bounds__(kThreads)
    nvfp4_amax_kernel(const __grid_constant__ QuantizeNvfp4Args args, bool vector) {
  const int64_t elements = args.matrix.rows * args.matrix.columns;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kGroup;
  int32_t largest = 0;
  int64_t element = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kGroup;
  for (; element < elements; element += stride) {
    float values[kGroup];
    load_group(args.matrix.values, group_of_row(0, element, elements, vector), values);
    largest = larger(largest, group_max(values));
  }
  largest = row_max<kThreads>(largest);
  if (threadIdx.x == 0) args.partials[blockIdx.x] = as_float(largest);
}

template <int kRowThreads>
__global__ void __launch_bounds__(kThreads)
    quantize_nvfp4_kernel(const __grid_constant__ QuantizeNvfp4Args args, bool vector) {
  const Matrix& matrix = args.matrix;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= args.scale_rows) return;
  const float global_scale = *args.global_scale;
  const int64_t padded = args.scale_columns * kBlockSize;
  for (int64_t start = 0; start < padded; start += kRowThreads * kGroup) {
    const int64_t element = start + threadIdx.x % kRowThreads * kGroup;
    const bool real = row < matrix.rows && element < matrix.columns;
    float values[kGroup] = {};
    if (real) load_group(matrix.values, group_of_row(row, element, matrix.columns, vector), values);
    store_nvfp4_group(args, row, element, values, global_scale, real);
  }
}

template <int kRowThreads>
__global__ void __launch_bounds__(kThreads)
    dequantize_fp8_kernel(const __grid_constant__ DequantizeFp8Args args, bool vector) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= args.rows) return;
  const float scale = args.scale[row];
  for (int64_t element = threadIdx.x % kRowThreads * kGroup; element < args.columns; element += kRowThreads * kGroup) {
    const Group group = group_of_row(row, element, args.columns, vector);
    const uint8_t* source = args.codes + group.offset;
    alignas(8) uint8_t codes[kGroup];
    if (vector) {
      *reinterpret_cast<uint64_t*>(codes) = *reinterpret_cast<const uint64_t*>(source);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) codes[i] = i < group.count ? source[i] : 0;
    }
    float values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = e4m3_to_float(codes[i]) * scale;
    store_group(args.values, group, values);
  }
}

template <int kRowThreads>
__global__ void __launch_bounds__(kThreads)
    dequantize_nvfp4_kernel(const __grid_constant__ DequantizeNvfp4Args args, bool vector) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= args.rows) return;
  const float global_scale = *args.global_scale;
  for (int64_t element = threadIdx.x % kRowThreads * kGroup; element < args.columns; element += kRowThreads * kGroup) {
    const Group group = group_of_row(row, element, args.columns, vector);
    const uint8_t* source = args.codes + group.offset / 2;
    const int64_t place = scale_offset(row, element / kBlockSize, args.scale_columns, args.swizzle);
    const float scale = e4m3_to_float(args.scales[place]) * global_scale;
    float values[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = e2m1_to_float(source[i / 2] >> (i % 2 * 4) & 0xfu) * scale;
    store_group(args.values, group, values);
  }
}

// Launches the copy of a kernel for rows of this length.
template <typename Args>
void launch_rows(void (*short_rows)(Args, bool), void (*long_rows)(Args, bool), const Args& args, bool vector,
                 int64_t rows, int64_t columns, void* stream) {
  constexpr int kShortRows = kThreads / kWarp;
  if (columns <= kShortRow) {
    FLOWGRPO_LAUNCH(short_rows, (rows + kShortRows - 1) / kShortRows, kThreads, stream, args, vector);
  } else {
    FLOWGRPO_LAUNCH(long_rows, rows, kThreads, stream, args, vector);
  }
}

}  // namespace

void quantize_fp8_rows(const QuantizeFp8Args& args, void* stream) {
  const Matrix& matrix = args.matrix;
  if (matrix.rank) return merge_quantize_fp8_rows(args, stream);
  const bool vector = can_vectorize(matrix) && aligned8(args.codes);
  launch_rows(quantize_fp8_kernel<kWarp>, quantize_fp8_kernel<kThreads>, args, vector, matrix.rows, matrix.columns,
              stream);
}

void quantize_nvfp4(const QuantizeNvfp4Args& args, void* stream) {
  const Matrix& matrix = args.matrix;
  if (matrix.rank) return merge_quantize_nvfp4(args, stream);
  const bool vector = can_vectorize(matrix);
  if (!args.is_static) {
    const int64_t chunks = num_chunks(matrix.rows * matrix.columns);
    const int64_t num_blocks = chunks < kMaxPartials ? chunks : kMaxPartials;
    FLOWGRPO_LAUNCH(nvfp4_amax_kernel, num_blocks, kThreads, stream, args, vector);
    FLOWGRPO_LAUNCH(nvfp4_global_scale_kernel, 1, kThreads, stream, args.partials, num_blocks, args.global_scale);
  }
  launch_rows(quantize_nvfp4_kernel<kWarp>, quantize_nvfp4_kernel<kThreads>, args, vector, args.scale_rows,
              matrix.columns, stream);
}

void dequantize_fp8_rows(const DequantizeFp8Args& args, void* stream) {
  const bool vector = args.columns % kGroup == 0 && aligned8(args.codes) && aligned16(args.values.data);
  launch_rows(dequantize_fp8_kernel<kWarp>, dequantize_fp8_kernel<kThreads>, args, vector, args.rows, args.columns,
              stream);
}

void dequantize_nvfp4(const DequantizeNvfp4Args& args, void* stream) {
  launch_rows(dequantize_nvfp4_kernel<kWarp>, dequantize_nvfp4_kernel<kThreads>, args, aligned16(args.values.data),
              args.rows, args.columns, stream);
}

}  // namespace flowgrpo_fast::cuda
