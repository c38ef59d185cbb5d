// Groups: the eight neighbouring elements a thread works on at a time, two Philox blocks and one 16-byte load of a
// 16-bit dtype. Samples that are not multiples of eight long, or arrays not 16-byte aligned, take the element-wise
// path.
#pragma once

#include "reduce.cuh"

namespace flowgrpo_fast::cuda {

constexpr int kGroup = 8;
static_assert(kChunk % (kThreads * kGroup) == 0, "the threads of a block must fill a chunk");

// Where a group lies, counted from the sample's and from the array's start, and how many of its elements are real.
struct Group {
  int64_t element, offset;
  int count;
  bool vector;
};

struct ChunkRange {
  int64_t sample, first, last;
};

__device__ __forceinline__ ChunkRange chunk_range(int64_t elements) {
  const int64_t chunks = num_chunks(elements);
  const int64_t sample = blockIdx.x / chunks, first = (blockIdx.x % chunks) * kChunk;
  return {sample, first, first + kChunk < elements ? first + kChunk : elements};
}

__device__ __forceinline__ Group group_at(const ChunkRange& range, int64_t element, int64_t elements, bool vector) {
  const int64_t left = range.last - element;
  return {element, range.sample * elements + element, static_cast<int>(left < kGroup ? left : kGroup), vector};
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// Copies `size` bytes, a multiple of 16, with 16-byte instructions.
template <int size>
__device__ __forceinline__ void copy_vector(void* target, const void* source) {
#pragma unroll
  for (int i = 0; i < size / 16; ++i) static_cast<Bytes16*>(target)[i] = static_cast<const Bytes16*>(source)[i];
}

template <typename Stored>
__device__ __forceinline__ void load_stored(const void* data, const Group& group, Stored* values) {
  const Stored* source = static_cast<const Stored*>(data) + group.offset;
  if (group.vector) {
    copy_vector<kGroup * sizeof(Stored)>(values, source);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = i < group.count ? source[i] : Stored(0);
  }
}

template <typename Stored>
__device__ __forceinline__ void store_stored(void* data, const Group& group, const Stored* values) {
  Stored* target = static_cast<Stored*>(data) + group.offset;
  if (group.vector) {
    copy_vector<kGroup * sizeof(Stored)>(target, values);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < group.count) target[i] = values[i];
    }
  }
}

__device__ __forceinline__ void load_group(const Buffer& buffer, const Group& group, double* values) {
  alignas(16) double stored[kGroup];
  load_stored(buffer.data, group, stored);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) values[i] = stored[i];
}

__device__ __forceinline__ void load_group(const Buffer& buffer, const Group& group, float* values) {
  if (buffer.dtype == DType::kFloat32) {
    alignas(16) float stored[kGroup];
    load_stored(buffer.data, group, stored);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) values[i] = stored[i];
    return;
  }
  alignas(16) uint16_t stored[kGroup];
  load_stored(buffer.data, group, stored);
  const bool is_bfloat16 = buffer.dtype == DType::kBFloat16;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    values[i] = is_bfloat16 ? bfloat16_to_float(stored[i]) : float16_to_float(stored[i]);
  }
}

// Rounds to the storage dtype, stores, and leaves in `values` what was stored.
__device__ __forceinline__ void store_group(const Buffer& buffer, const Group& group, double* values) {
  alignas(16) double stored[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) stored[i] = values[i];
  store_stored(buffer.data, group, stored);
}

__device__ __forceinline__ void store_group(const Buffer& buffer, const Group& group, float* values) {
  if (buffer.dtype == DType::kFloat32) {
    alignas(16) float stored[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) stored[i] = values[i];
    return store_stored(buffer.data, group, stored);
  }
  alignas(16) uint16_t stored[kGroup];
  const bool is_bfloat16 = buffer.dtype == DType::kBFloat16;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    stored[i] = is_bfloat16 ? float_to_bfloat16(values[i]) : float_to_float16(values[i]);
    values[i] = is_bfloat16 ? bfloat16_to_float(stored[i]) : float16_to_float(stored[i]);
  }
  store_stored(buffer.data, group, stored);
}

template <typename Real>
__device__ __forceinline__ Buffer real_buffer(const void* data) {
  return {const_cast<void*>(data), sizeof(Real) == 8 ? DType::kFloat64 : DType::kFloat32};
}

template <typename Real>
__device__ __forceinline__ void normal_group(PhiloxKey key, const Group& group, uint32_t step, uint32_t stream,
                                             Real* noise) {
#pragma unroll
  for (int half = 0; half < kGroup / kWordsPerBlock; ++half) {
    const PhiloxWords words = philox4x32_10(philox_counter(group.element / kWordsPerBlock + half, step, stream), key);
    const NormalPair low = box_muller(words.word[0], words.word[1]);
    const NormalPair high = box_muller(words.word[2], words.word[3]);
    noise[kWordsPerBlock * half + 0] = low.first;
    noise[kWordsPerBlock * half + 1] = low.second;
    noise[kWordsPerBlock * half + 2] = high.first;
    noise[kWordsPerBlock * half + 3] = high.second;
  }
}

// The mean of the next latents and what it came from; `velocity` is the guided one.
template <typename Real>
struct MeanGroup {
  Real latents[kGroup], velocity[kGroup], mean[kGroup];
};

template <typename Real>
__device__ __forceinline__ void mean_group(const Transition& transition, const Row<Real>& row, const Group& group,
                                           MeanGroup<Real>* out) {
  load_group(transition.latents, group, out->latents);
  load_group(transition.velocity, group, out->velocity);
  if (transition.negative_velocity.data) {
    Real negative[kGroup];
    load_group(transition.negative_velocity, group, negative);
    const Real scale = static_cast<Real>(transition.guidance_scale);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out->velocity[i] = guided(out->velocity[i], negative[i], scale);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) out->mean[i] = mean_of(row, out->latents[i], out->velocity[i]);
  if (transition.x0_prev) {
    Real x0_prev[kGroup];
    load_group(real_buffer<Real>(transition.x0_prev), group, x0_prev);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out->mean[i] += row.d * x0_prev[i];
  }
}

template <typename Real>
__device__ __forceinline__ Real squared_distance(const Real* next, const Real* mean, int count) {
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const Real distance = next[i] - mean[i];
    sum += i < count ? distance * distance : Real(0);
  }
  return sum;
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every array of a transition may be read in groups.
inline bool can_vectorize(const Transition& transition) {
  return transition.elements % kGroup == 0 && aligned16(transition.latents.data) &&
         aligned16(transition.velocity.data) && aligned16(transition.negative_velocity.data) &&
         aligned16(transition.x0_prev);
}

}  // namespace flowgrpo_fast::cuda
