// The ops on groups on the CPU. Sorting and copying gain nothing from wider instructions, so what is made of these is
// whole here.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu_dispatch.h"
#include "group.h"

namespace flowgrpo_fast::cpu {
namespace {

struct Ranked {
  int64_t key;
  int index;
};

// Ascending; equal values by index.
void rank(Ranked* samples, int count) {
  std::sort(samples, samples + count,
            [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; });
}

// Takes the num_top highest of the ascending candidates, highest first, then the num_bottom lowest of the others,
// lowest first; of equal ones those with the lower index first.
void take(const Ranked* ascending, int candidates, int num_top, int num_bottom, int64_t* taken) {
  bool is_top[kMaxCandidates] = {};
  int filled = 0;
  for (int end = candidates, begin; filled < num_top; end = begin) {
    for (begin = end - 1; begin > 0 && ascending[begin - 1].key == ascending[end - 1].key;) --begin;
    for (int i = begin; i < end && filled < num_top; ++i) {
      taken[filled++] = ascending[i].index;
      is_top[i] = true;
    }
  }
  for (int i = 0; filled < num_top + num_bottom; ++i) {
    if (!is_top[i]) taken[filled++] = ascending[i].index;
  }
}

void select_prompt(const SelectArgs& args, int64_t prompt) {
  const int candidates = args.candidates, size = args.num_top + args.num_bottom;
  const int64_t row = prompt * candidates;
  Ranked ranked[kMaxCandidates];
  for (int i = 0; i < candidates; ++i) ranked[i] = {order_key(real_at(args.rewards, row + i)), i};
  std::sort(ranked, ranked + candidates,
            [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key < b.key : a.index < b.index; });
  int64_t* taken = args.indices + prompt * size;
  if (!args.best_variance) return take(ranked, candidates, args.num_top, args.num_bottom, taken);
  double sorted[kMaxCandidates];
  for (int i = 0; i < candidates; ++i) sorted[i] = real_at(args.rewards, row + ranked[i].index);
  const int num_bottom = best_num_bottom(sorted, candidates, size);
  take(ranked, candidates, size - num_bottom, num_bottom, taken);
  std::sort(taken, taken + size);
}

// Sets bit i of masks `at_least` and `higher` of a sample where sample i is that in one objective.
struct Above {
  uint64_t at_least, higher;
};

void compare(const Ranked* ascending, int count, Above* above) {
  uint64_t higher = 0;
  for (int end = count, begin; end > 0; end = begin) {
    uint64_t equal = 0;
    for (begin = end; begin > 0 && ascending[begin - 1].key == ascending[end - 1].key; --begin) {
      equal |= uint64_t{1} << ascending[begin - 1].index;
    }
    for (int i = begin; i < end; ++i) {
      above[ascending[i].index].at_least &= higher | equal;
      above[ascending[i].index].higher |= higher;
    }
    higher |= equal;
  }
}

void pareto_fronts_prompt(const ParetoFrontsArgs& args, int64_t prompt) {
  const int count = args.candidates;
  Above above[kMaxFront];
  std::fill(above, above + count, Above{~uint64_t{0}, 0});
  for (int objective = 0; objective < args.num_objectives; ++objective) {
    Ranked ranked[kMaxFront];
    for (int i = 0; i < count; ++i) {
      ranked[i] = {order_key(real_at(args.objectives, (prompt * count + i) * args.num_objectives + objective)), i};
    }
    rank(ranked, count);
    compare(ranked, count, above);
  }
  uint64_t left = ~uint64_t{0} >> (kMaxFront - count);
  for (int64_t front = 0; left; ++front) {
    uint64_t peeled = 0;
    for (int i = 0; i < count; ++i) {
      if (!(left >> i & 1) || above[i].at_least & above[i].higher & left) continue;
      peeled |= uint64_t{1} << i;
      args.fronts[prompt * count + i] = front;
    }
    left &= ~peeled;
  }
}

constexpr int64_t kPiece = 1 << 16;  // bytes one work item copies: short, so that threads share few rows evenly

// Copies one piece of one row, counted through all buffers.
void copy_piece(const CompactArgs& args, int64_t piece) {
  int buffer = args.num_buffers - 1;
  while (args.rows[buffer].first_block > piece) --buffer;
  const Rows& rows = args.rows[buffer];
  const int64_t pieces = (rows.row_bytes + kPiece - 1) / kPiece;
  const int64_t local = piece - rows.first_block, row = local / pieces, start = local % pieces * kPiece;
  const int64_t source = clamped(args.indices[row], rows.num_rows);
  std::memcpy(rows.target + row * rows.row_bytes + start, rows.source + source * rows.row_bytes + start,
              static_cast<size_t>(std::min(kPiece, rows.row_bytes - start)));
}

}  // namespace

void group_advantages(const GroupAdvantagesArgs& given, int num_threads) {
  const DefaultFloatMode mode;
  GroupAdvantagesArgs args = given;
  const bool is_gdpo = args.aggregate == Aggregate::kGdpo;
  const int64_t columns = num_columns(args), elements = args.batch * args.num_rewards;
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  std::vector<int64_t> next(size(args.num_groups + 1)), members(size(args.batch));
  std::vector<double> values(size(columns * args.batch)), combined(size(is_gdpo ? args.batch : 0));
  double batch_std[kMaxRewards];
  // Counting sort: next[group] is where the group starts, and while it fills where its next sample goes.
  for (int64_t i = 0; i < args.batch; ++i) ++next[size(args.group_id[i] + 1)];
  for (size_t group = 1; group < next.size(); ++group) next[group] += next[group - 1];
  const std::vector<int64_t> first_member = next;
  for (int64_t i = 0; i < args.batch; ++i) {
    const int64_t place = next[size(args.group_id[i])]++;
    members[size(place)] = i;
    for (int k = 0; k < columns; ++k) values[size(k * args.batch + place)] = column_value(args, i, k);
  }
  args.members = members.data();
  args.first_member = first_member.data();
  args.values = values.data();
  args.combined = combined.data();
  args.batch_std = batch_std;
  if (args.batch_scale) run_items(FLOWGRPO_PICK(batch_std_column), args, columns, elements, num_threads);
  run_items(FLOWGRPO_PICK(group_advantages_group), args, args.num_groups, elements, num_threads);
  if (is_gdpo) run_items(FLOWGRPO_PICK(group_advantages_batch), args, 1, args.batch, 1);
}

// A sorted sample costs about as much as this many elements elsewhere.
constexpr int64_t kSort = 8;

void select_samples(const SelectArgs& args, int num_threads) {
  run_items(select_prompt, args, args.prompts, kSort * args.prompts * args.candidates, num_threads);
}

void pareto_fronts(const ParetoFrontsArgs& args, int num_threads) {
  run_items(pareto_fronts_prompt, args, args.prompts, kSort * args.prompts * args.candidates * args.num_objectives,
            num_threads);
}

void compact(const CompactArgs& given, int num_threads) {
  CompactArgs args = given;
  int64_t pieces = 0, bytes = 0;
  for (int i = 0; i < args.num_buffers; ++i) {
    Rows& rows = args.rows[i];
    rows.first_block = pieces;
    pieces += args.num_indices * ((rows.row_bytes + kPiece - 1) / kPiece);
    bytes += args.num_indices * rows.row_bytes;
  }
  run_items(copy_piece, args, pieces, bytes / 8, num_threads);
}

}  // namespace flowgrpo_fast::cpu
