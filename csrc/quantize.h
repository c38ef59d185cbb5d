// A matrix, or a weight with a LoRA merged into it, in eight or four bits a value, for both devices:
//
//   merged  = weight + lora_scale * (lora_b @ lora_a)         (products added in order 0, 1, ..., rank - 1)
//
// FP8 rows (one fp32 scale a row):
//   scale   = max(amax(row), tiny) / 448
//   code    = e4m3(value / scale)
//
// NVFP4 (an E4M3 scale for each 16 values of a row, one fp32 scale for all):
//   global  = max(amax(matrix), tiny) / (448 * 6)             (unless given)
//   scale   = e4m3(max(amax(block) / 6 / global, 2^-6))
//   code    = e2m1(value * ((1 / global) / scale))            (two a byte, the first in the low half)
//
// Largest magnitudes are maxima of bit patterns: exact in any order, and a NaN wins over everything.
#pragma once

#include "declare.h"
#include "low_precision.h"

namespace flowgrpo_fast {

constexpr int kBlockSize = 16;  // values an E4M3 scale
constexpr int kTileRows = 128;  // rows and columns of a tile of swizzled scales
constexpr int kTileColumns = 4;
constexpr int64_t kMaxRank = 256;
constexpr int kMergeRows = 32;          // rows the CPU merges at a time
constexpr int kMergeTile = 256;         // columns
constexpr int64_t kMaxPartials = 1024;  // partial maxima of the CUDA kernels
constexpr float kTinyAmax = 0x1p-100f;  // a smaller maximum counts as this: zeros have a scale too
constexpr float kSmallestScale = 0x1p-6f;

// Rows of values, 16 or 32 bits each; of rank 0, or with a LoRA to be merged.
struct Matrix {
  Buffer values;  // [rows, columns]
  Buffer lora_a;  // [rank, columns]
  Buffer lora_b;  // [rows, rank]
  float lora_scale;
  int64_t rows;
  int64_t columns;
  int64_t rank;
  int64_t first_row;  // row of the outputs where row 0 of the values goes
};

struct QuantizeFp8Args {
  Matrix matrix;
  uint8_t* codes;  // out [rows, columns]
  float* scale;    // out [rows]
};

struct QuantizeNvfp4Args {
  Matrix matrix;
  uint8_t* codes;       // out [rows, columns / 2]
  uint8_t* scales;      // out, see scale_offset()
  float* global_scale;  // [1], out unless is_static
  float* partials;      // workspace: [kMaxPartials] on a GPU
  int64_t scale_rows;   // all rows of scales, with padding
  int64_t scale_columns;
  bool is_static;
  bool swizzle;
};

struct DequantizeFp8Args {
  const uint8_t* codes;
  const float* scale;
  Buffer values;  // out [rows, columns]
  int64_t rows;
  int64_t columns;
};

struct DequantizeNvfp4Args {
  const uint8_t* codes;
  const uint8_t* scales;
  const float* global_scale;
  Buffer values;  // out [rows, columns]
  int64_t rows;
  int64_t columns;
  int64_t scale_columns;
  bool swizzle;
};

// On the CPU, merges kMergeRows rows into fp32 scratch.
struct MergeRowsArgs {
  Matrix matrix;
  float* merged;  // out [kMergeRows, columns]
  float* lora_a;  // workspace [rank, kMergeTile]
  float* lora_b;  // workspace [kMergeRows, rank]
};

FLOWGRPO_HD int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Where the scale of a block lies: row-major, or in tiles of 128 x 4 in which four groups of 32 rows lie side by side.
FLOWGRPO_HD int64_t scale_offset(int64_t row, int64_t column, int64_t columns, bool swizzle) {
  if (!swizzle) return row * columns + column;
  const int64_t tile = row / kTileRows * (columns / kTileColumns) + column / kTileColumns;
  const int64_t place = row % 32 * 16 + row % kTileRows / 32 * kTileColumns + column % kTileColumns;
  return tile * kTileRows * kTileColumns + place;
}

FLOWGRPO_HD int32_t magnitude_of(float value) { return static_cast<int32_t>(bits_of(value) & 0x7fffffffu); }

FLOWGRPO_HD float fp8_scale(float amax) { return (amax < kTinyAmax ? kTinyAmax : amax) / kE4M3Max; }

FLOWGRPO_HD float nvfp4_global_scale(float amax) {
  return (amax < kTinyAmax ? kTinyAmax : amax) / (kE4M3Max * kE2M1Max);
}

FLOWGRPO_HD uint32_t nvfp4_scale(float amax, float global_scale) {
  const float scale = amax / kE2M1Max / global_scale;
  return float_to_e4m3(scale < kSmallestScale ? kSmallestScale : scale);
}

FLOWGRPO_HD float nvfp4_reciprocal(uint32_t scale, float global_scale) {
  return 1.0f / global_scale / e4m3_to_float(scale);
}

FLOWGRPO_DECLARE_OP(quantize_fp8_rows, QuantizeFp8Args)
FLOWGRPO_DECLARE_OP(quantize_nvfp4, QuantizeNvfp4Args)
FLOWGRPO_DECLARE_OP(dequantize_fp8_rows, DequantizeFp8Args)
FLOWGRPO_DECLARE_OP(dequantize_nvfp4, DequantizeNvfp4Args)

FLOWGRPO_DECLARE_KERNEL(quantize_fp8_row, QuantizeFp8Args)
FLOWGRPO_DECLARE_KERNEL(quantize_nvfp4_row, QuantizeNvfp4Args)
FLOWGRPO_DECLARE_KERNEL(nvfp4_amax_row, QuantizeNvfp4Args)
FLOWGRPO_DECLARE_KERNEL(dequantize_fp8_row, DequantizeFp8Args)
FLOWGRPO_DECLARE_KERNEL(dequantize_nvfp4_row, DequantizeNvfp4Args)
FLOWGRPO_DECLARE_KERNEL(merge_rows, MergeRowsArgs)

}  // namespace flowgrpo_fast
