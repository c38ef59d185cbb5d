// Merging a LoRA into rows of a weight on the CPU, compiled once per instruction set.
#include "cpu_tile.h"
#include "quantize.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

// A register of floats. Products are formed for kSumRows rows and two registers of columns at a time: half of the
// registers are running sums.
#if defined(__AVX512F__)
typedef float Lanes32 __attribute__((vector_size(64)));
constexpr int kSumRows = 8;
#elif defined(__AVX2__)
typedef float Lanes32 __attribute__((vector_size(32)));
constexpr int kSumRows = 4;
#else
typedef float Lanes32 __attribute__((vector_size(16)));
constexpr int kSumRows = 4;
#endif
constexpr int kWidth = sizeof(Lanes32) / sizeof(float);
static_assert(kTile == kMergeTile && kMergeRows % kSumRows == 0 && kTile % (2 * kWidth) == 0,
              "sums must fill rows and tiles");

static inline Lanes32 load_lanes(const float* source) {
  Lanes32 lanes;
  memcpy(&lanes, source, sizeof lanes);
  return lanes;
}

// delta[row][0 .. 2 * kWidth) = sum over j of lora_b[row][j] * lora_a[j][...], in order.
static inline void add_products(const float* lora_a, const float* lora_b, int64_t rank, float (*delta)[kTile]) {
  Lanes32 sum[kSumRows][2] = {};
  for (int64_t j = 0; j < rank; ++j) {
    const Lanes32 low = load_lanes(lora_a + j * kTile), high = load_lanes(lora_a + j * kTile + kWidth);
    for (int row = 0; row < kSumRows; ++row) {
      const float factor = lora_b[row * rank + j];
      sum[row][0] += factor * low;
      sum[row][1] += factor * high;
    }
  }
  for (int row = 0; row < kSumRows; ++row) memcpy(delta[row], sum[row], sizeof sum[row]);
}

static inline void delta_tile(const MergeRowsArgs& args, float (*delta)[kTile]) {
  const int64_t rank = args.matrix.rank;
  for (int column = 0; column < kTile; column += 2 * kWidth) {
    for (int row = 0; row < kMergeRows; row += kSumRows) {
      float (*target)[kTile] = reinterpret_cast<float (*)[kTile]>(&delta[row][column]);
      add_products(args.lora_a + column, args.lora_b + row * rank, rank, target);
    }
  }
}

// `span` of a matrix as floats at `target`, zero-padded to a tile.
static inline void load_into(const Buffer& buffer, const Span& span, float* target) {
  const float* source = load_tile(buffer, span, target);
  if (source != target) memcpy(target, source, kTile * sizeof(float));
}

void merge_rows(const MergeRowsArgs& args, int64_t index) {
  const Matrix& matrix = args.matrix;
  const int64_t columns = matrix.columns, rank = matrix.rank, left = matrix.rows - index;
  const int rows = static_cast<int>(left < kMergeRows ? left : kMergeRows);
  float delta[kMergeRows][kTile], scratch[kTile];
  for (int row = 0; row < kMergeRows; ++row) {
    for (int64_t j = 0; j < rank; ++j) args.lora_b[row * rank + j] = 0.0f;
  }
  for (int row = 0; row < rows; ++row) {
    const Span span = {0, (index + row) * rank, static_cast<int>(rank)};
    const float* factors = load_tile(matrix.lora_b, span, scratch);
    memcpy(args.lora_b + row * rank, factors, rank * sizeof(float));
  }
  for (int64_t element = 0; element < columns; element += kTile) {
    const int64_t rest = columns - element;
    const int count = static_cast<int>(rest < kTile ? rest : kTile);
    for (int64_t j = 0; j < rank; ++j) {
      load_into(matrix.lora_a, {element, j * columns + element, count}, args.lora_a + j * kTile);
    }
    delta_tile(args, delta);
    for (int row = 0; row < rows; ++row) {
      const float* weight = load_tile(matrix.values, {element, (index + row) * columns + element, count}, scratch);
      float* merged = args.merged + row * columns + element;
      for (int i = 0; i < count; ++i) merged[i] = weight[i] + matrix.lora_scale * delta[row][i];
    }
  }
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
