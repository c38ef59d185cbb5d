// The preview and its Gram matrix on the CPU: rows over the threads.
#include "cpu_dispatch.h"
#include "preview.h"

namespace flowgrpo_fast::cpu {

void preview(const PreviewArgs& args, int num_threads) {
  const Transition& transition = args.transition;
  run_items(FLOWGRPO_PICK(preview_row), args, transition.batch * preview_rows(args),
            transition.batch * transition.elements, num_threads);
}

void gram(const GramArgs& args, int num_threads) {
  const int64_t members = args.groups * args.group_size;
  run_items(FLOWGRPO_PICK(gram_centre), args, args.groups * centre_tiles(args), members * args.features, num_threads);
  run_items(FLOWGRPO_PICK(gram_row), args, members, members * args.group_size * args.features, num_threads);
}

}  // namespace flowgrpo_fast::cpu
