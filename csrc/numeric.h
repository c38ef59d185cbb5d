// Scalar building blocks shared by the CPU and the CUDA code: bit casts, storage types and their rounding.
//
// Everything here is plain multiply/add/select, compiled without contraction, so that a value is the same bits on every
// instruction set. Functions are static: a translation unit compiled for AVX-512 must not lend its copy to the others.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FLOWGRPO_HD static __host__ __device__ __forceinline__
#else
#define FLOWGRPO_HD static inline __attribute__((always_inline))
#endif

namespace flowgrpo_fast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A borrowed array: where it starts and what one element is. A null pointer is an absent optional argument.
struct Buffer {
  void* data;
  DType dtype;
};

FLOWGRPO_HD int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

FLOWGRPO_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FLOWGRPO_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// bfloat16 is the upper half of a float32.
FLOWGRPO_HD float bfloat16_to_float(uint16_t stored) { return float_of(static_cast<uint32_t>(stored) << 16); }

// Round to nearest even; a NaN stays a (quiet) NaN.
FLOWGRPO_HD uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t quiet = bits | 0x00400000u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>((is_nan ? quiet : rounded) >> 16);
}

// Moves the 5-bit exponent up by the difference of the biases with one exact multiplication, which also normalises
// subnormals; infinities and NaNs land at 2^16 and above and get the full exponent back.
FLOWGRPO_HD float float16_to_float(uint16_t stored) {
  const uint32_t sign = static_cast<uint32_t>(stored & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(stored & 0x7fffu) << 13;
  const float scaled = float_of(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  return float_of((magnitude >= 0x0f800000u ? special : bits_of(scaled)) | sign);
}

// Round to nearest even. Results below 2^-14 are rounded by adding 1/2, whose last place is float16's smallest step.
FLOWGRPO_HD uint16_t float_to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>((magnitude >= 0x477ff000u ? special : finite) | sign);
}

}  // namespace flowgrpo_fast
