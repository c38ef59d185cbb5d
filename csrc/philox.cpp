// Philox normals and words on the CPU, compiled once per instruction set.
#include "philox.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

static void store_words(const PhiloxArgs& args, const Span& span, PhiloxKey key, PhiloxWords counter) {
  uint32_t words[kWordsPerBlock][kBlocks];
  philox_tile(key, counter, words);
  int64_t* target = args.words + span.offset;
  for (int i = 0; i < span.count; ++i) target[i] = words[i % kWordsPerBlock][i / kWordsPerBlock];
}

void philox_chunk(const PhiloxArgs& args, int64_t index) {
  const ChunkRange range = chunk_range(index, args.elements);
  const int64_t step = args.step_index ? args.step_index[range.sample * args.step_stride] : args.step;
  const PhiloxKey key = philox_key(args.seed[range.sample]);
  for (int64_t element = range.first; element < range.last; element += kTile) {
    const Span span = span_of(range, element, args.elements);
    const PhiloxWords counter =
        philox_counter(element / kWordsPerBlock, static_cast<uint32_t>(step), static_cast<uint32_t>(args.stream));
    if (args.words) {
      store_words(args, span, key, counter);
    } else if (args.normal.dtype == DType::kFloat64) {
      double normal[kTile];
      normal_tile(key, counter, normal);
      store_tile(args.normal, span, normal);
    } else {
      float normal[kTile];
      normal_tile(key, counter, normal);
      store_tile(args.normal, span, normal);
    }
  }
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
