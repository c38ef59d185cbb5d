// The preview and its Gram matrix on the CPU: runs of rows over the threads.
#include <algorithm>
#include <vector>

#include "cpu_dispatch.h"
#include "preview.h"

namespace flowgrpo_fast::cpu {

void preview(const PreviewArgs& args, int num_threads) {
  const Transition& transition = args.transition;
  run_items(FLOWGRPO_PICK(preview_run), args, transition.batch * preview_runs(args),
            transition.batch * transition.elements, num_threads);
}

void gram(const GramArgs& given, int num_threads) {
  GramArgs args = given;
  const int64_t entries = args.groups * args.group_size * args.group_size, tiles = gram_tiles(args);
  const int64_t most = std::clamp<int64_t>(kGramRound / entries, 1, tiles);
  std::vector<double> partials(static_cast<size_t>(most * entries)), sums(static_cast<size_t>(entries));
  args.partials = partials.data();
  args.sums = sums.data();
  for (; args.first_tile < tiles; args.first_tile += most) {
    args.num_tiles = std::min(most, tiles - args.first_tile);
    run_items(FLOWGRPO_PICK(gram_tile), args, args.groups * args.num_tiles,
              entries * std::min(args.num_tiles * kGramTile, args.features), num_threads);
    run_items(FLOWGRPO_PICK(gram_row), args, args.groups * args.group_size, args.num_tiles * entries, num_threads);
  }
}

}  // namespace flowgrpo_fast::cpu
