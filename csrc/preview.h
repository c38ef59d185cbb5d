// A preview of running samples: the clean sample one step would jump to, averaged over cells of its grid.
//
//   x0     = latents - sigma * v                        (v as in flow_step.h)
//   pooled = mean of x0 over a cell of pool_time * pool_height * pool_width positions, channel by channel
//
// and the Gram matrix of the previews of a group, about their mean:
//
//   gram[i, j] = sum_features (pooled_i - mean_of_group) * (pooled_j - mean_of_group)
//
// A cell is summed down its rows, then along them, both from the start; a Gram entry over features counted from the
// start, so nothing depends on what else is in the batch or on the thread count.
#pragma once

#include "flow_step.h"

namespace flowgrpo_fast {

// A sample lies as [planes, time, height, width * inner]: planes are channels that come first, inner those that come
// last, and the other of the two is 1. A row is one line of the pooled grid; it is made of the neighbouring lines of a
// cell's height, for each of its times.
struct PreviewArgs {
  Transition transition;
  int64_t planes, time, height, width, inner;
  int64_t pool_time, pool_height, pool_width;  // divide time, height and width
  void* pooled;                                // out [batch, rows, width / pool_width * inner], arithmetic dtype
};

struct GramArgs {
  Buffer pooled;  // [groups * group_size, features], arithmetic dtype
  int64_t groups, group_size, features;
  void* centred;                  // workspace of the same shape
  int64_t first_tile, num_tiles;  // of this round, CPU only
  double* partials;               // workspace [groups, num_tiles, group_size, group_size], CPU only
  double* sums;                   // workspace [groups, group_size, group_size], CPU only: of the rounds before
  void* gram;                     // out [groups, group_size, group_size], arithmetic dtype
};

constexpr int64_t kRunColumns = 1024;    // of neighbouring rows the CPU takes at a time
constexpr int64_t kGramTile = 256;       // features of a group the CPU takes at a time
constexpr int64_t kGramRound = 1 << 22;  // partial sums of a round on the CPU, if more than one tile has

FLOWGRPO_HD int64_t gram_tiles(const GramArgs& args) { return (args.features + kGramTile - 1) / kGramTile; }

FLOWGRPO_HD int64_t preview_rows(const PreviewArgs& args) {
  return args.planes * (args.time / args.pool_time) * (args.height / args.pool_height);
}

// Neighbouring rows of a sample that the CPU takes at a time: one, or as many as have kRunColumns together.
FLOWGRPO_HD int64_t preview_rows_a_run(const PreviewArgs& args) {
  const int64_t columns = args.width * args.inner;
  return args.inner == 1 && columns < kRunColumns ? kRunColumns / columns : 1;
}

FLOWGRPO_HD int64_t preview_runs(const PreviewArgs& args) {
  const int64_t rows_a_run = preview_rows_a_run(args);
  return (preview_rows(args) + rows_a_run - 1) / rows_a_run;
}

// The first element of a sample's row. Index is int64_t, or uint32_t on a GPU, whose 64-bit divisions are slow.
template <typename Index>
FLOWGRPO_HD int64_t preview_start(const PreviewArgs& args, Index row) {
  const Index heights = static_cast<Index>(args.height / args.pool_height);
  const Index times = static_cast<Index>(args.time / args.pool_time);
  const int64_t height = row % heights * args.pool_height, time = row / heights % times * args.pool_time;
  const int64_t plane = row / heights / times;
  return ((plane * args.time + time) * args.height + height) * args.width * args.inner;
}

template <typename Real>
FLOWGRPO_HD Real x0_of(const Row<Real>& row, Real latents, Real velocity) {
  return latents - row.sigma * velocity;
}

template <typename Real>
FLOWGRPO_HD Real cell_scale(const PreviewArgs& args) {
  return static_cast<Real>(1.0 / static_cast<double>(args.pool_time * args.pool_height * args.pool_width));
}

FLOWGRPO_DECLARE_OP(preview, PreviewArgs)
FLOWGRPO_DECLARE_OP(gram, GramArgs)

FLOWGRPO_DECLARE_KERNEL(preview_run, PreviewArgs)
FLOWGRPO_DECLARE_KERNEL(gram_tile, GramArgs)
FLOWGRPO_DECLARE_KERNEL(gram_row, GramArgs)

}  // namespace flowgrpo_fast
