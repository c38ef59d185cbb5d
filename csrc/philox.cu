// Philox normals and words on a GPU.
#include "cuda_group.cuh"
#include "philox.h"

namespace flowgrpo_fast::cuda {
namespace {

__device__ __forceinline__ void store_words(const PhiloxArgs& args, const Group& group, PhiloxKey key, uint32_t step,
                                            uint32_t stream) {
#pragma unroll
  for (int half = 0; half < kGroup / kWordsPerBlock; ++half) {
    const PhiloxWords words = philox4x32_10(philox_counter(group.element / kWordsPerBlock + half, step, stream), key);
#pragma unroll
    for (int k = 0; k < kWordsPerBlock; ++k) {
      const int i = kWordsPerBlock * half + k;
      if (i < group.count) args.words[group.offset + i] = words.word[k];
    }
  }
}

__global__ void __launch_bounds__(kThreads) philox_kernel(const __grid_constant__ PhiloxArgs args, bool vector) {
  const ChunkRange range = chunk_range(args.elements);
  const int64_t step = args.step_index ? args.step_index[range.sample * args.step_stride] : args.step;
  const PhiloxKey key = philox_key(args.seed[range.sample]);
  const uint32_t step_word = static_cast<uint32_t>(step), stream_word = static_cast<uint32_t>(args.stream);
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, args.elements, vector);
    if (args.words) {
      store_words(args, group, key, step_word, stream_word);
    } else if (args.normal.dtype == DType::kFloat64) {
      double normal[kGroup];
      normal_group(key, group, step_word, stream_word, normal);
      store_group(args.normal, group, normal);
    } else {
      float normal[kGroup];
      normal_group(key, group, step_word, stream_word, normal);
      store_group(args.normal, group, normal);
    }
  }
}

}  // namespace

void philox(const PhiloxArgs& args, void* stream) {
  const bool vector = args.elements % kGroup == 0 && aligned16(args.normal.data);
  FLOWGRPO_LAUNCH(philox_kernel, args.batch * num_chunks(args.elements), kThreads, stream, args, vector);
}

}  // namespace flowgrpo_fast::cuda
