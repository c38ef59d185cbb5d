// The preview and its Gram matrix on the CPU: runs of rows over the threads.
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
  std::vector<double> partials(static_cast<size_t>(tiles * entries));
  args.partials = partials.data();
  run_items(FLOWGRPO_PICK(gram_tile), args, args.groups * tiles, entries * args.features, num_threads);
  run_items(FLOWGRPO_PICK(gram_row), args, args.groups * args.group_size, tiles * entries, num_threads);
}

}  // namespace flowgrpo_fast::cpu
