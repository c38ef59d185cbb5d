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

// What float_to_e4m3() gives for a value that its row's scale has brought to a magnitude of 448 at most.
static inline uint32_t finite_code(float value) {
  return static_cast<uint32_t>(finite_to_e4m3(magnitude_of(value))) | e4m3_sign(value);
}

void quantize_fp8_row(const QuantizeFp8Args& args, int64_t index) {
  const Matrix& matrix = args.matrix;
  const int64_t row = matrix.first_row + index;
  const float scale = fp8_scale(row_amax(matrix.values, index, matrix.columns));
  const bool is_finite = magnitude_of(scale) < 0x7f800000;  // then so is every value
  uint8_t* codes = args.codes + row * matrix.columns;
  float scratch[kTile];
  uint32_t rounded[kTile];
  uint8_t narrow[kTile];
  for (int64_t element = 0; element < matrix.columns; element += kTile) {
    const Span span = span_of_row(index, element, matrix.columns);
    const float* values = load_tile(matrix.values, span, scratch);
    if (is_finite) {
      for (int i = 0; i < kTile; ++i) rounded[i] = finite_code(values[i] / scale);
    } else {
      for (int i = 0; i < kTile; ++i) rounded[i] = float_to_e4m3(values[i] / scale);
    }
    uint8_t* target = span.count == kTile ? codes + element : narrow;
    for (int i = 0; i < kTile; ++i) target[i] = static_cast<uint8_t>(rounded[i]);
    if (target == narrow) memcpy(codes + element, narrow, span.count);
  }
  args.scale[row] = scale;
}

constexpr int kTileBlocks = kTile / kBlockSize;

// A block's floats as one vector, whatever the registers' width: a loop over them in a loop over blocks would be
// vectorised across blocks.
typedef float BlockLanes __attribute__((vector_size(kBlockSize * sizeof(float))));

static inline void scale_blocks(const float* values, const float* factor, float* scaled) {
  for (int block = 0; block < kTileBlocks; ++block) {
    BlockLanes lanes;
    memcpy(&lanes, values + block * kBlockSize, sizeof lanes);
    lanes *= factor[block];
    memcpy(scaled + block * kBlockSize, &lanes, sizeof lanes);
  }
}

static inline void max_of_pairs(const int32_t* values, int count, int32_t* larger) {
  for (int i = 0; i < count; ++i) larger[i] = values[2 * i] > values[2 * i + 1] ? values[2 * i] : values[2 * i + 1];
}

// The largest magnitude of each block of a tile.
static inline void block_amax(const float* values, float* amax) {
  int32_t of1[kTile], of2[kTile / 2], of4[kTile / 4], of8[kTile / 8], of16[kTile / 16];
  for (int i = 0; i < kTile; ++i) of1[i] = magnitude_of(values[i]);
  max_of_pairs(of1, kTile / 2, of2);
  max_of_pairs(of2, kTile / 4, of4);
  max_of_pairs(of4, kTile / 8, of8);
  max_of_pairs(of8, kTile / 16, of16);
  memcpy(amax, of16, sizeof of16);
}

static inline void pack_tile(const float* values, const float* reciprocal, uint8_t* packed) {
  float scaled[kTile];
  uint32_t codes[kTile];
  uint8_t narrow[kTile];
  uint16_t pairs[kTile / 2];  // the first code of two in the low half, as in memory
  scale_blocks(values, reciprocal, scaled);
  for (int i = 0; i < kTile; ++i) codes[i] = float_to_e2m1(scaled[i]);
  for (int i = 0; i < kTile; ++i) narrow[i] = static_cast<uint8_t>(codes[i]);
  memcpy(pairs, narrow, sizeof pairs);
  for (int i = 0; i < kTile / 2; ++i) packed[i] = static_cast<uint8_t>(pairs[i] | pairs[i] >> 4);
}

void quantize_nvfp4_row(const QuantizeNvfp4Args& args, int64_t index) {
  const Matrix& matrix = args.matrix;
  const int64_t row = matrix.first_row + index;
  const int64_t blocks = index < matrix.rows ? matrix.columns / kBlockSize : 0;
  const int64_t stride = args.swizzle ? kTileRows * kTileColumns : kTileColumns;  // from four scales to the next
  const float global_scale = *args.global_scale;
  uint8_t* codes = args.codes + row * matrix.columns / 2;
  float scratch[kTile], amax[kTileBlocks], reciprocal[kTileBlocks];
  uint32_t scales[kTileBlocks];
  uint8_t packed[kTile / 2];
  for (int64_t first = 0; first < blocks; first += kTileBlocks) {
    const Span span = span_of_row(index, first * kBlockSize, matrix.columns);
    const float* values = load_tile(matrix.values, span, scratch);
    block_amax(values, amax);
    for (int i = 0; i < kTileBlocks; ++i) scales[i] = nvfp4_scale(amax[i], global_scale);
    for (int i = 0; i < kTileBlocks; ++i) reciprocal[i] = nvfp4_reciprocal(scales[i], global_scale);
    pack_tile(values, reciprocal, packed);
    memcpy(codes + first * kBlockSize / 2, packed, span.count / 2);
    uint8_t* target = args.scales + scale_offset(row, first, args.scale_columns, args.swizzle);
    for (int i = 0; i < span.count / kBlockSize; ++i) {
      target[i / kTileColumns * stride + i % kTileColumns] = static_cast<uint8_t>(scales[i]);
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
    scale_blocks(values, scale, values);
    store_tile(args.values, span, values);
  }
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
