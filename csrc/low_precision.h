// Values of eight and four bits: E4M3 (float8_e4m3fn) and E2M1 (float4_e2m1fn), for both devices.
//
// Plain integer and multiply/add/select code, so that a code is the same bits on every device and instruction set.
// Conversions round to nearest even and saturate: E4M3 at 448, E2M1 at 6. E4M3 has one NaN a sign, of which 0x7f is
// stored; E2M1 has none, and a NaN becomes 6 as in the GPUs' own conversion.
#pragma once

#include "numeric.h"

namespace flowgrpo_fast {

constexpr float kE4M3Max = 448.0f;
constexpr float kE2M1Max = 6.0f;

// A magnitude of at most 448 (before rounding). Adding 2^20 times its power of two, of 2^-6 at least, leaves the step
// of E4M3 as the last place: the sum counts steps, and rounds.
FLOWGRPO_HD int32_t finite_to_e4m3(int32_t magnitude) {
  const int32_t power = (magnitude > 0x3c800000 ? magnitude : 0x3c800000) & 0x7f800000;
  const float sum = float_of(magnitude) + float_of(power + 0x0a000000);
  return static_cast<int32_t>(bits_of(sum)) - power + (power >> 20) - (0x0a000000 + 0x3c8);
}

FLOWGRPO_HD uint32_t e4m3_sign(float value) { return (bits_of(value) >> 24) & 0x80u; }

FLOWGRPO_HD uint32_t float_to_e4m3(float value) {
  const int32_t magnitude = static_cast<int32_t>(bits_of(value) & 0x7fffffffu);
  const int32_t code = finite_to_e4m3(magnitude < 0x43e00000 ? magnitude : 0x43e00000);
  return magnitude > 0x7f800000 ? 0x7fu : static_cast<uint32_t>(code) | e4m3_sign(value);
}

// Moves the exponent up by the difference of the biases with one exact multiplication, which normalises subnormals.
FLOWGRPO_HD float e4m3_to_float(uint32_t code) {
  const uint32_t sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
  const uint32_t finite = bits_of(float_of(magnitude << 20) * 0x1p120f);
  return float_of((magnitude == 0x7fu ? 0x7fc00000u : finite) | sign);
}

// Adding 2^22, whose last place is E2M1's smallest step 1/2, rounds what is below the smallest normal number 1.
FLOWGRPO_HD uint32_t float_to_e2m1(float value) {
  const uint32_t bits = bits_of(value);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t capped = magnitude < 0x40c00000 ? magnitude : 0x40c00000;
  const int32_t normal = (capped - 0x3f000000 + 0x1fffff + ((capped >> 22) & 1)) >> 22;
  const int32_t subnormal = static_cast<int32_t>(bits_of(float_of(capped) + 0x1p22f)) - 0x4a800000;
  const uint32_t finite = static_cast<uint32_t>(capped < 0x3f800000 ? subnormal : normal) | ((bits >> 28) & 0x8u);
  return magnitude > 0x7f800000 ? 0x7u : finite;
}

FLOWGRPO_HD float e2m1_to_float(uint32_t code) {
  const uint32_t sign = (code & 0x8u) << 28;
  return float_of(bits_of(float_of((code & 0x7u) << 22) * 0x1p126f) | sign);
}

}  // namespace flowgrpo_fast
