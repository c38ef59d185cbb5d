// Tiles: 256 elements in the dtype of the arithmetic, small enough for the first-level cache. A kernel walks a chunk
// tile by tile in short loops over fixed arrays, which the compiler turns into vector code for any instruction set.
//
// Included by the sources that are compiled once per instruction set: no standard library templates here, all static.
#pragma once

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside its own AVX-512 header
#endif
#include <immintrin.h>
#endif

#include "flow_step.h"

#ifndef FLOWGRPO_ISA
#error "FLOWGRPO_ISA names the instruction set this file is compiled for"
#endif

namespace flowgrpo_fast::FLOWGRPO_ISA {

constexpr int kTile = 256;
constexpr int kBlocks = kTile / kWordsPerBlock;
constexpr int kLanes = 64;  // partial sums a tile is folded into
constexpr int kFold = 8;
static_assert(kChunk % kTile == 0 && kTile % kLanes == 0 && kLanes % kFold == 0, "tiles must fill chunks");

// Where a tile lies: its first element counted from the sample's start, from the array's start, and how many are real.
struct Span {
  int64_t element;
  int64_t offset;
  int count;
};

struct ChunkRange {
  int64_t sample, first, last;
};

static inline ChunkRange chunk_range(int64_t index, int64_t elements) {
  const int64_t chunks = num_chunks(elements);
  const int64_t sample = index / chunks, first = (index % chunks) * kChunk;
  return {sample, first, first + kChunk < elements ? first + kChunk : elements};
}

static inline Span span_of(const ChunkRange& range, int64_t element, int64_t elements) {
  const int64_t left = range.last - element;
  return {element, range.sample * elements + element, static_cast<int>(left < kTile ? left : kTile)};
}

// bfloat16 as a type of its own, for loops that convert in registers.
struct Bfloat16 {
  uint16_t bits;
};

static inline float widened(Bfloat16 stored) { return bfloat16_to_float(stored.bits); }
static inline float widened(float stored) { return stored; }
static inline double widened(double stored) { return stored; }

static inline void store_rounded(float value, Bfloat16* target) { target->bits = float_to_bfloat16(value); }
static inline void store_rounded(float value, float* target) { *target = value; }
static inline void store_rounded(double value, double* target) { *target = value; }

template <typename Stored>
static inline Stored* at(const Buffer& buffer, const Span& span) {
  return static_cast<Stored*>(buffer.data) + span.offset;
}

template <typename Real>
static inline void widen(const Real* source, Real* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = source[i];
}

static inline void widen_bfloat16(const uint16_t* source, float* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = bfloat16_to_float(source[i]);
}

static inline void widen_float16(const uint16_t* source, float* values, int count) {
  for (int i = 0; i < count; ++i) values[i] = float16_to_float(source[i]);
}

// The tile's values in the arithmetic dtype: the array itself where it already is that, else `scratch`, zero-padded.
static inline const float* load_tile(const Buffer& buffer, const Span& span, float* scratch) {
  if (buffer.dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(buffer.data) + span.offset;
    if (span.count == kTile) return source;
    widen(source, scratch, span.count);
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(buffer.data) + span.offset;
    if (buffer.dtype == DType::kBFloat16) {
      span.count == kTile ? widen_bfloat16(source, scratch, kTile) : widen_bfloat16(source, scratch, span.count);
    } else {
      span.count == kTile ? widen_float16(source, scratch, kTile) : widen_float16(source, scratch, span.count);
    }
  }
  for (int i = span.count; i < kTile; ++i) scratch[i] = 0.0f;
  return scratch;
}

static inline const double* load_tile(const Buffer& buffer, const Span& span, double* scratch) {
  const double* source = static_cast<const double*>(buffer.data) + span.offset;
  if (span.count == kTile) return source;
  widen(source, scratch, span.count);
  for (int i = span.count; i < kTile; ++i) scratch[i] = 0.0;
  return scratch;
}

// Where a tile's results are computed: in the array itself where that holds the arithmetic dtype, else in `scratch`.
template <typename Real>
static inline Real* tile_target(const Buffer& buffer, const Span& span, Real* scratch) {
  const bool in_place = span.count == kTile && size_of(buffer.dtype) == sizeof(Real);
  return in_place ? static_cast<Real*>(buffer.data) + span.offset : scratch;
}

// Stores what was computed in tile_target(), rounded to the storage dtype.
static inline void store_tile(const Buffer& buffer, const Span& span, const float* values) {
  if (buffer.dtype == DType::kFloat32) {
    float* target = at<float>(buffer, span);
    if (target != values) widen(values, target, span.count);
    return;
  }
  uint16_t rounded[kTile];
  uint16_t* target = at<uint16_t>(buffer, span);
  uint16_t* stored = span.count == kTile ? target : rounded;
  if (buffer.dtype == DType::kBFloat16) {
    for (int i = 0; i < kTile; ++i) stored[i] = float_to_bfloat16(values[i]);
  } else {
    for (int i = 0; i < kTile; ++i) stored[i] = float_to_float16(values[i]);
  }
  if (stored == rounded) memcpy(target, rounded, span.count * sizeof(uint16_t));
}

static inline void store_tile(const Buffer& buffer, const Span& span, const double* values) {
  double* target = static_cast<double*>(buffer.data) + span.offset;
  if (target != values) widen(values, target, span.count);
}

#if defined(__x86_64__)
// Philox on 64-bit lanes that hold one 32-bit word each: the 32 x 32 -> 64 bit multiplication is then one instruction,
// and what is left above a word harms nothing, because multiplications and the final packing read the lower half only.
#if defined(__AVX512F__)
typedef uint64_t Lanes64 __attribute__((vector_size(64)));
static inline Lanes64 multiply_low(Lanes64 a, Lanes64 b) { return (Lanes64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
typedef uint64_t Lanes64 __attribute__((vector_size(32)));
static inline Lanes64 multiply_low(Lanes64 a, Lanes64 b) { return (Lanes64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#else
typedef uint64_t Lanes64 __attribute__((vector_size(16)));
static inline Lanes64 multiply_low(Lanes64 a, Lanes64 b) { return (Lanes64)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#endif

struct WordLanes {
  Lanes64 word[kWordsPerBlock];
};

static inline void philox_round(WordLanes* state, uint64_t key_low, uint64_t key_high) {
  const Lanes64 zero = {};
  const Lanes64 product0 = multiply_low(zero + kMultiplier0, state->word[0]);
  const Lanes64 product1 = multiply_low(zero + kMultiplier1, state->word[2]);
  state->word[0] = (product1 >> 32) ^ state->word[1] ^ (zero + key_low);
  state->word[1] = product1;
  state->word[2] = (product0 >> 32) ^ state->word[3] ^ (zero + key_high);
  state->word[3] = product0;
}

// The Philox words of a tile, word k of all its blocks side by side.
static inline void philox_tile(PhiloxKey key, PhiloxWords counter, uint32_t (*words)[kBlocks]) {
  constexpr int kWidth = sizeof(Lanes64) / sizeof(uint64_t);
  Lanes64 lane = {};
  for (int i = 0; i < kWidth; ++i) lane[i] = 2 * i;
  for (int start = 0; start < kBlocks; start += 2 * kWidth) {
    // Even and odd blocks apart, so that packing them is one shift. A tile starts at a multiple of 64 blocks: the low
    // counter word cannot carry inside it.
    WordLanes even, odd;
    for (int k = 0; k < kWordsPerBlock; ++k) even.word[k] = odd.word[k] = Lanes64{} + counter.word[k];
    even.word[0] += lane + start;
    odd.word[0] += lane + (start + 1);
    uint32_t low = key.low, high = key.high;
    FLOWGRPO_UNROLL_ROUNDS
    for (int round = 0; round < kRounds; ++round) {
      philox_round(&even, low, high);
      philox_round(&odd, low, high);
      low += kWeyl0;
      high += kWeyl1;
    }
    for (int k = 0; k < kWordsPerBlock; ++k) {
      const Lanes64 packed = (even.word[k] & 0xffffffffu) | (odd.word[k] << 32);
      memcpy(&words[k][start], &packed, sizeof packed);
    }
  }
}
#else
// The Philox words of a tile, word k of all its blocks side by side.
static inline void philox_tile(PhiloxKey key, PhiloxWords counter, uint32_t (*words)[kBlocks]) {
  for (int i = 0; i < kBlocks; ++i) {
    const PhiloxWords block = {{counter.word[0] + i, counter.word[1], counter.word[2], counter.word[3]}};
    const PhiloxWords random = philox4x32_10(block, key);
    for (int k = 0; k < kWordsPerBlock; ++k) words[k][i] = random.word[k];
  }
}
#endif

template <typename Real>
static inline void normal_tile(PhiloxKey key, PhiloxWords counter, Real* normal) {
  uint32_t words[kWordsPerBlock][kBlocks];
  float part[kWordsPerBlock][kBlocks];
  philox_tile(key, counter, words);
  for (int i = 0; i < kBlocks; ++i) {
    const NormalPair low = box_muller(words[0][i], words[1][i]);
    const NormalPair high = box_muller(words[2][i], words[3][i]);
    part[0][i] = low.first;
    part[1][i] = low.second;
    part[2][i] = high.first;
    part[3][i] = high.second;
  }
  for (int i = 0; i < kBlocks; ++i) {
    for (int k = 0; k < kWordsPerBlock; ++k) normal[kWordsPerBlock * i + k] = part[k][i];
  }
}

// What all ops share: the mean of the next latents, and the tile arrays it came from.
template <typename Real>
struct MeanTile {
  const Real* latents;
  const Real* velocity;  // guided
  Real mean[kTile];
  Real scratch[3][kTile];
};

template <typename Real>
static inline void mean_tile(const Transition& transition, const Row<Real>& row, const Span& span,
                             MeanTile<Real>* tile) {
  const Real* latents = load_tile(transition.latents, span, tile->scratch[0]);
  const Real* velocity = load_tile(transition.velocity, span, tile->scratch[1]);
  if (transition.negative_velocity.data) {
    const Real* negative = load_tile(transition.negative_velocity, span, tile->scratch[2]);
    const Real scale = static_cast<Real>(transition.guidance_scale);
    Real* mixed = tile->scratch[1];
    for (int i = 0; i < kTile; ++i) mixed[i] = guided(velocity[i], negative[i], scale);
    velocity = mixed;
  }
  Real* mean = tile->mean;
  for (int i = 0; i < kTile; ++i) mean[i] = mean_of(row, latents[i], velocity[i]);
  if (transition.x0_prev) {
    const Real* x0_prev = static_cast<const Real*>(transition.x0_prev) + span.offset;
    for (int i = 0; i < span.count; ++i) mean[i] += row.d * x0_prev[i];
  }
  tile->latents = latents;
  tile->velocity = velocity;
}

// Adds the squared distances of a tile to the lanes. Callers make both arrays equal behind the sample's end.
template <typename Stored, typename Real>
static inline void add_squares(const Stored* next, const Stored* mean, Real* lanes) {
  for (int start = 0; start < kTile; start += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const Real distance = widened(next[start + i]) - widened(mean[start + i]);
      lanes[i] += distance * distance;
    }
  }
}

// Whether a tile needs no guidance or padding and has one dtype, so that its mean can be formed in registers.
static inline bool is_plain_but_history(const Transition& transition, const Buffer& next, int count) {
  const DType dtype = transition.latents.dtype;
  return count == kTile && dtype != DType::kFloat16 && transition.velocity.dtype == dtype && next.dtype == dtype &&
         !transition.negative_velocity.data;
}

// The same, of a mean that is of latents and velocity alone.
static inline bool is_plain(const Transition& transition, const Buffer& next, int count) {
  return is_plain_but_history(transition, next, count) && !transition.x0_prev;
}

// A plain tile: its arrays as they are stored, and how far the next latents are from the mean. The operations are those
// of mean_tile(), so the bits are, too.
template <typename Stored>
struct PlainTile {
  const Stored *latents, *velocity, *next;

  PlainTile(const Transition& transition, const Buffer& next_latents, const Span& span)
      : latents(at<Stored>(transition.latents, span)),
        velocity(at<Stored>(transition.velocity, span)),
        next(at<Stored>(next_latents, span)) {}

  template <typename Real>
  Real distance(const Row<Real>& row, int i) const {
    return widened(next[i]) - mean_of<Real>(row, widened(latents[i]), widened(velocity[i]));
  }
};

template <typename Stored, typename Real>
static inline void add_plain_squares(const Row<Real>& row, const PlainTile<Stored>& tile, Real* lanes) {
  for (int start = 0; start < kTile; start += kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const Real distance = tile.distance(row, start + i);
      lanes[i] += distance * distance;
    }
  }
}

template <typename Real>
static inline double sum_lanes(const Real* lanes) {
  double folded[kFold] = {};
  for (int start = 0; start < kLanes; start += kFold) {
    for (int i = 0; i < kFold; ++i) folded[i] += static_cast<double>(lanes[start + i]);
  }
  double sum = 0.0;
  for (int i = 0; i < kFold; ++i) sum += folded[i];
  return sum;
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
