// Quantising on the CPU: rows over the threads. A LoRA is merged into a few rows at a time, which then count as the
// matrix.
#include <algorithm>
#include <memory>
#include <vector>

#include "cpu_dispatch.h"
#include "quantize.h"

namespace flowgrpo_fast::cpu {
namespace {

// Runs a kernel on each of `count` rows, of which those past the matrix are padding.
template <typename Args>
void run_rows(void (*kernel)(const Args&, int64_t), const Args& args, int64_t count, int num_threads) {
  const Matrix& matrix = args.matrix;
  if (matrix.rank == 0) return run_items(kernel, args, count, matrix.rows * matrix.columns, num_threads);
  const auto merge = FLOWGRPO_PICK(merge_rows);
  const int64_t groups = (count + kMergeRows - 1) / kMergeRows;
  const int64_t work = matrix.rows * matrix.columns * matrix.rank;
  parallel_for(groups, threads_for(work, num_threads), [&](int64_t group) {
    const int64_t first = group * kMergeRows, last = std::min(first + kMergeRows, count);
    const std::unique_ptr<float[]> scratch(
        new float[kMergeRows * matrix.columns + matrix.rank * (kMergeTile + kMergeRows)]);
    float* lora_a = scratch.get() + kMergeRows * matrix.columns;
    if (first < matrix.rows) merge({matrix, scratch.get(), lora_a, lora_a + matrix.rank * kMergeTile}, first);
    Args part = args;
    part.matrix.values = {scratch.get(), DType::kFloat32};
    part.matrix.rows = matrix.rows - first;
    part.matrix.first_row = first;
    for (int64_t row = first; row < last; ++row) kernel(part, row - first);
  });
}

}  // namespace

void quantize_fp8_rows(const QuantizeFp8Args& args, int num_threads) {
  run_rows(FLOWGRPO_PICK(quantize_fp8_row), args, args.matrix.rows, num_threads);
}

void quantize_nvfp4(const QuantizeNvfp4Args& args, int num_threads) {
  if (!args.is_static) {
    std::vector<float> amax(static_cast<size_t>(args.matrix.rows));
    QuantizeNvfp4Args pass = args;
    pass.partials = amax.data();
    run_rows(FLOWGRPO_PICK(nvfp4_amax_row), pass, args.matrix.rows, num_threads);
    int32_t largest = 0;
    for (const float value : amax) largest = std::max(largest, magnitude_of(value));
    const DefaultFloatMode mode;
    *args.global_scale = nvfp4_global_scale(float_of(static_cast<uint32_t>(largest)));
  }
  run_rows(FLOWGRPO_PICK(quantize_nvfp4_row), args, args.scale_rows, num_threads);
}

void dequantize_fp8_rows(const DequantizeFp8Args& args, int num_threads) {
  run_items(FLOWGRPO_PICK(dequantize_fp8_row), args, args.rows, args.rows * args.columns, num_threads);
}

void dequantize_nvfp4(const DequantizeNvfp4Args& args, int num_threads) {
  run_items(FLOWGRPO_PICK(dequantize_nvfp4_row), args, args.rows, args.rows * args.columns, num_threads);
}

}  // namespace flowgrpo_fast::cpu
