// Quantising and dequantising rows on the CPU, compiled once per instruction set.
#include "quantize.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

static inline Span span_of_row(int64_t row, int64_t element, int64_t columns) {
  const int64_t left = columns - element;
  return {element, row * columns + element, static_cast<int>(left < kTile ? left : kTile)};
}

// Sixteen-bit formats keep the order of magnitudes in their bits, too.
static inline float row_amax(const Buffer& values, int64_t row, int64_t columns) {
  if (values.dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(values.data) + row * columns;
    int32_t largest = 0;
    for (int64_t i = 0; i < columns; ++i) {
      const int32_t magnitude = magnitude_of(source[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    return float_of(static_cast<uint32_t>(largest));
  }
  const uint16_t* source = static_cast<const uint16_t*>(values.data) + row * columns;
  int16_t largest = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const int16_t magnitude = static_cast<int16_t>(source[i] & 0x7fff);
    largest = magnitude > largest ? magnitude : largest;
  }
  const uint16_t bits = static_cast<uint16_t>(largest);
  return values.dtype == DType::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

void quantize_fp8_row(const QuantizeFp8Args& args, int64_t index) {
  const Matrix& matrix = args.matrix;
  const int64_t row = matrix.first_row + index;
  const float scale = fp8_scale(row_amax(matrix.values, index, matrix.columns));
  uint8_t* codes = args.codes + row * matrix.columns;
  float scratch[kTile];
  uint8_t rounded[kTile];
  for (int64_t element = 0; element < matrix.columns; element += kTile) {
    const Span span = span_of_row(index, element, matrix.columns);
    const float* values = load_tile(matrix.values, span, scratch);
    for (int i = 0; i < kTile; ++i) rounded[i] = static_cast<uint8_t>(float_to_e4m3(values[i] / scale));
    memcpy(codes + element, rounded, span.count);
  }
  args.scale[row] = scale;
}

constexpr int kTileBlocks = kTile / kBlockSize;

// The largest magnitude of each block of a tile.
static inline void block_amax(const float* values, float* amax) {
  for (int block = 0; block < kTileBlocks; ++block) {
    int32_t largest = 0;
    for (int i = 0; i < kBlockSize; ++i) {
      const int32_t magnitude = magnitude_of(values[block * kBlockSize + i]);
      largest = magnitude > largest ? magnitude : largest;
    }
    amax[block] = float_of(static_cast<uint32_t>(largest));
  }
}

static inline void pack_tile(const float* values, const float* reciprocal, uint8_t* packed) {
  uint8_t codes[kTile];
  for (int block = 0; block < kTileBlocks; ++block) {
    for (int i = 0; i < kBlockSize; ++i) {
      const int place = block * kBlockSize + i;
      codes[place] = static_cast<uint8_t>(float_to_e2m1(values[place] * reciprocal[block]));
    }
  }
  for (int i = 0; i < kTile / 2; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}

void quantize_nvfp4_row(const QuantizeNvfp4Args& args, int64_t index) {
  const Matrix& matrix = args.matrix;
  const int64_t row = matrix.first_row + index;
  const int64_t blocks = index < matrix.rows ? matrix.columns / kBlockSize : 0;
  const float global_scale = *args.global_scale;
  uint8_t* codes = args.codes + row * matrix.columns / 2;
  float scratch[kTile], amax[kTileBlocks], reciprocal[kTileBlocks];
  uint8_t scales[kTileBlocks], packed[kTile / 2];
  for (int64_t first = 0; first < blocks; first += kTileBlocks) {
    const Span span = span_of_row(index, first * kBlockSize, matrix.columns);
    const float* values = load_tile(matrix.values, span, scratch);
    block_amax(values, amax);
    for (int i = 0; i < kTileBlocks; ++i) scales[i] = static_cast<uint8_t>(nvfp4_scale(amax[i], global_scale));
    for (int i = 0; i < kTileBlocks; ++i) reciprocal[i] = nvfp4_reciprocal(scales[i], global_scale);
    pack_tile(values, reciprocal, packed);
    memcpy(codes + first * kBlockSize / 2, packed, span.count / 2);
    for (int i = 0; i < span.count / kBlockSize; ++i) {
      args.scales[scale_offset(row, first + i, args.scale_columns, args.swizzle)] = scales[i];
    }
  }
  for (int64_t block = blocks; block < args.scale_columns; ++block) {
    args.scales[scale_offset(row, block, args.scale_columns, args.swizzle)] = 0;
  }
}

void nvfp4_amax_row(const QuantizeNvfp4Args& args, int64_t index) {
  args.partials[args.matrix.first_row + index] = row_amax(args.matrix.values, index, args.matrix.columns);
}

void dequantize_fp8_row(const DequantizeFp8Args& args, int64_t index) {
  const uint8_t* codes = args.codes + index * args.columns;
  const float scale = args.scale[index];
  float scratch[kTile];
  uint8_t padded[kTile] = {};
  for (int64_t element = 0; element < args.columns; element += kTile) {
    const Span span = span_of_row(index, element, args.columns);
    memcpy(padded, codes + element, span.count);
    float* values = tile_target(args.values, span, scratch);
    for (int i = 0; i < kTile; ++i) values[i] = e4m3_to_float(padded[i]) * scale;
    store_tile(args.values, span, values);
  }
}

void dequantize_nvfp4_row(const DequantizeNvfp4Args& args, int64_t index) {
  const uint8_t* codes = args.codes + index * args.columns / 2;
  const float global_scale = *args.global_scale;
  float scratch[kTile], scale[kTileBlocks] = {};
  uint8_t padded[kTile / 2] = {}, unpacked[kTile];
  uint16_t pairs[kTile / 2];  // the first value of two in the low half, as in memory
  for (int64_t element = 0; element < args.columns; element += kTile) {
    const Span span = span_of_row(index, element, args.columns);
    memcpy(padded, codes + element / 2, span.count / 2);
    for (int i = 0; i < span.count / kBlockSize; ++i) {
      const int64_t block = element / kBlockSize + i;
      scale[i] =
          e4m3_to_float(args.scales[scale_offset(index, block, args.scale_columns, args.swizzle)]) * global_scale;
    }
    for (int i = 0; i < kTile / 2; ++i) pairs[i] = static_cast<uint16_t>((padded[i] & 0xf) | (padded[i] & 0xf0) << 4);
    memcpy(unpacked, pairs, sizeof unpacked);
    float* values = tile_target(args.values, span, scratch);
    for (int i = 0; i < kTile; ++i) values[i] = e2m1_to_float(unpacked[i]);
    for (int block = 0; block < kTileBlocks; ++block) {
      for (int i = 0; i < kBlockSize; ++i) values[block * kBlockSize + i] *= scale[block];
    }
    store_tile(args.values, span, values);
  }
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
