// Counter-based standard normal noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011) followed by the Box-Muller transform with polynomials of our own, so that no libm decides a bit.
//
//   key     = (low, high) 32 bits of the sample's seed
//   counter = (low, high) 32 bits of element / 4, step, stream
//   the four words of a block give the normals of elements 4 * block ... 4 * block + 3
#pragma once

#include "numeric.h"

#ifdef __CUDACC__
#define FLOWGRPO_UNROLL_ROUNDS  // nvcc unrolls ten rounds unasked
#else
#define FLOWGRPO_UNROLL_ROUNDS _Pragma("GCC unroll 10")
#endif

#ifdef __CUDA_ARCH__
#define FLOWGRPO_SQRT(x) __fsqrt_rn(x)
#else
#define FLOWGRPO_SQRT(x) __builtin_sqrtf(x)
#endif

namespace flowgrpo_fast {

constexpr int kWordsPerBlock = 4;
constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
constexpr uint32_t kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;  // golden ratio and sqrt(3) - 1: the keys' increments
constexpr uint32_t kStepStream = 0;                             // noise of a stochastic step
constexpr uint32_t kStartStream = 1;                            // noise a trajectory starts from

struct PhiloxWords {
  uint32_t word[kWordsPerBlock];
};

struct PhiloxKey {
  uint32_t low, high;
};

struct NormalPair {
  float first, second;
};

FLOWGRPO_HD PhiloxKey philox_key(int64_t seed) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

FLOWGRPO_HD PhiloxWords philox4x32_10(PhiloxWords counter, PhiloxKey key) {
  uint32_t w0 = counter.word[0], w1 = counter.word[1], w2 = counter.word[2], w3 = counter.word[3];
  uint32_t k0 = key.low, k1 = key.high;
  FLOWGRPO_UNROLL_ROUNDS
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * w0;
    const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * w2;
    w0 = static_cast<uint32_t>(product1 >> 32) ^ w1 ^ k0;
    w1 = static_cast<uint32_t>(product1);
    w2 = static_cast<uint32_t>(product0 >> 32) ^ w3 ^ k1;
    w3 = static_cast<uint32_t>(product0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{w0, w1, w2, w3}};
}

FLOWGRPO_HD PhiloxWords philox_counter(int64_t block, uint32_t step, uint32_t stream) {
  const uint64_t bits = static_cast<uint64_t>(block);
  return {{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), step, stream}};
}

// log(u) for u = (word + 1/2) / 2^32 rounded to float32, which lies in [2^-32, 1]. Splits u = 2^e * (1 + f) with
// f in [sqrt(1/2) - 1, sqrt(2) - 1] and evaluates log(1 + f) = f - f^2/2 + f^3 P(f); P is a minimax fit (3.2e-8).
FLOWGRPO_HD float log_uniform(uint32_t word) {
  constexpr uint32_t kSqrtHalfBits = 0x3f3504f3u;
  constexpr float kLn2 = 0.693147182f;
  const float u = (static_cast<float>(static_cast<int32_t>(word >> 1)) + 0.5f) * 0x1p-31f;
  const int32_t exponent = static_cast<int32_t>(bits_of(u) - kSqrtHalfBits) >> 23;
  const float f = float_of(bits_of(u) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float p = 0.0870035961f;
  p = p * f - 0.142674759f;
  p = p * f + 0.149147868f;
  p = p * f - 0.165775865f;
  p = p * f + 0.199630618f;
  p = p * f - 0.250013381f;
  p = p * f + 0.333339095f;
  const float f2 = f * f;
  return static_cast<float>(exponent) * kLn2 + (f + f2 * (p * f - 0.5f));
}

// Box-Muller: radius sqrt(-2 log u) from one word, angle 2 pi word / 2^32 from the other. The angle is reduced to
// [-1/8, 1/8) turns in integers, so the reduction is exact; sine and cosine are minimax fits in turns (3e-9, 5e-11).
FLOWGRPO_HD NormalPair box_muller(uint32_t radius_word, uint32_t angle_word) {
  const float radius = FLOWGRPO_SQRT(-2.0f * log_uniform(radius_word));
  const uint32_t quadrant = (angle_word + 0x20000000u) >> 30;
  const float t = static_cast<float>(static_cast<int32_t>(angle_word - (quadrant << 30))) * 0x1p-32f;
  const float t2 = t * t;
  const float sine = t * (6.28318548f + t2 * (-41.3416634f + t2 * (81.5925522f + t2 * -75.4020691f)));
  const float cosine = 1.0f + t2 * (-19.7392082f + t2 * (64.9393234f + t2 * (-85.4437408f + t2 * 59.2459602f)));
  const uint32_t swap = 0u - (quadrant & 1u);
  const uint32_t difference = (bits_of(sine) ^ bits_of(cosine)) & swap;
  const uint32_t cosine_sign = ((quadrant + 1u) & 2u) << 30;
  const uint32_t sine_sign = (quadrant & 2u) << 30;
  const float turned_cosine = float_of(bits_of(cosine) ^ difference ^ cosine_sign);
  const float turned_sine = float_of(bits_of(sine) ^ difference ^ sine_sign);
  return {radius * turned_cosine, radius * turned_sine};
}

}  // namespace flowgrpo_fast
