// What is done to the samples of one prompt, a group: advantages, survivors, Pareto fronts, and the gathering of rows.
//
// All statistics are fp64. Sums run over a group's samples in the order of the batch, in a fixed number of lanes that
// are folded in order, so a group's numbers depend neither on the other groups nor on the thread count. Where samples
// are ranked, a NaN counts as lower than everything, and equal values keep the order of their indices.
#pragma once

#include <math.h>

#include "declare.h"
#include "numeric.h"

namespace flowgrpo_fast {

constexpr int kMaxRewards = 16;          // columns of group_advantages
constexpr int64_t kMaxGroups = 1 << 24;  // of group_advantages, unless the batch is larger: a table of them is made
constexpr int kMaxCandidates = 1024;     // samples of a prompt in a selection
constexpr int kMaxFront = 64;            // samples of a prompt in pareto_fronts, one bit each
constexpr int kMaxObjectives = 8;
constexpr int kMaxBuffers = 16;  // of compact
constexpr int kUnits = 1024;     // units of a buffer one block gathers
constexpr int kMaxUnitBytes = 16;

// How several rewards become one advantage; the numbers are those of the Python side.
enum class Aggregate : int32_t { kSum, kPerObjective, kGdpo, kSeparate };

struct GroupAdvantagesArgs {
  Buffer rewards;           // [batch, num_rewards]
  const int64_t* group_id;  // [batch]
  int64_t batch, num_groups;
  int num_rewards;
  Aggregate aggregate;
  bool batch_scale;  // divide by the standard deviation of the batch, not of the group
  double weights[kMaxRewards];
  double eps, clip, soft_clip;  // a clip of 0 is none
  Buffer advantages;            // out [batch], or [batch, num_rewards] for kSeparate; float32, or float64 as rewards
  int64_t* members;             // workspace [batch]: samples ordered by group
  const int64_t* first_member;  // workspace [num_groups + 1], CPU only: where each group starts in members
  const double* values;         // workspace [columns, batch], CPU only: the columns in the order of members
  double* combined;             // workspace [batch] for kGdpo: the sum of the z-scores
  double* batch_std;            // workspace [kMaxRewards] for batch_scale
};

struct SelectArgs {
  Buffer rewards;  // [prompts, candidates]
  int64_t prompts;
  int candidates, num_top, num_bottom;
  bool best_variance;  // num_top is then the number of survivors, and num_bottom is found
  int64_t* indices;    // out [prompts, num_top + num_bottom]
};

struct ParetoFrontsArgs {
  Buffer objectives;  // [prompts, candidates, num_objectives]
  int64_t prompts;
  int candidates, num_objectives;
  int64_t* fronts;  // out [prompts, candidates]
};

// Rows of one buffer as bytes. A unit is the widest word rows and pointers are multiples of.
struct Rows {
  const char* source;
  char* target;
  int64_t num_rows, row_bytes;
  int64_t first_block;  // CUDA: of the launch
  int32_t unit_bytes;
};

struct CompactArgs {
  const int64_t* indices;  // [num_indices]
  int64_t num_indices;
  int num_buffers;
  Rows rows[kMaxBuffers];
};

FLOWGRPO_HD double real_at(const Buffer& buffer, int64_t index) {
  if (buffer.dtype == DType::kFloat32) return static_cast<double>(static_cast<const float*>(buffer.data)[index]);
  if (buffer.dtype == DType::kFloat64) return static_cast<const double*>(buffer.data)[index];
  const uint16_t stored = static_cast<const uint16_t*>(buffer.data)[index];
  const float value = buffer.dtype == DType::kBFloat16 ? bfloat16_to_float(stored) : float16_to_float(stored);
  return static_cast<double>(value);
}

FLOWGRPO_HD void store_real(const Buffer& buffer, int64_t index, double value) {
  if (buffer.dtype == DType::kFloat64) {
    static_cast<double*>(buffer.data)[index] = value;
  } else {
    static_cast<float*>(buffer.data)[index] = static_cast<float>(value);
  }
}

// Columns that are normalised: the weighted sum, or every reward on its own.
FLOWGRPO_HD int num_columns(const GroupAdvantagesArgs& args) {
  return args.aggregate == Aggregate::kSum ? 1 : args.num_rewards;
}

FLOWGRPO_HD double column_value(const GroupAdvantagesArgs& args, int64_t sample, int column) {
  const int64_t row = sample * args.num_rewards;
  if (args.aggregate != Aggregate::kSum) return real_at(args.rewards, row + column);
  double sum = 0.0;
  for (int i = 0; i < args.num_rewards; ++i) sum += args.weights[i] * real_at(args.rewards, row + i);
  return sum;
}

// A column within a group. The mean is formed around the group's first value, so equal rewards leave exactly 0.
struct Scale {
  double mean, divisor;
};

FLOWGRPO_HD double z_score(double value, const Scale& scale) {
  return scale.divisor == 0.0 ? 0.0 : (value - scale.mean) / scale.divisor;
}

// NaN passes through.
FLOWGRPO_HD double clipped(const GroupAdvantagesArgs& args, double value) {
  if (args.clip > 0.0) value = value > args.clip ? args.clip : value < -args.clip ? -args.clip : value;
  return args.soft_clip > 0.0 ? args.soft_clip * tanh(value / args.soft_clip) : value;
}

// The advantage of a sample, or what the batch's z-score is taken of; value(column) is its column_value.
template <typename Value>
FLOWGRPO_HD void store_sample(const GroupAdvantagesArgs& args, int64_t sample, const Scale* scales,
                              const Value& value) {
  double sum = 0.0;
  for (int column = 0; column < num_columns(args); ++column) {
    const double z = z_score(value(column), scales[column]);
    const double weighted = args.aggregate == Aggregate::kSum ? z : args.weights[column] * z;
    if (args.aggregate == Aggregate::kSeparate) {
      store_real(args.advantages, sample * args.num_rewards + column, clipped(args, weighted));
    } else {
      sum += weighted;
    }
  }
  if (args.aggregate == Aggregate::kGdpo) {
    args.combined[sample] = sum;
  } else if (args.aggregate != Aggregate::kSeparate) {
    store_real(args.advantages, sample, clipped(args, sum));
  }
}

// Integers in the order of the values: NaN first, -0 equal to 0.
FLOWGRPO_HD int64_t order_key(double value) {
  constexpr int64_t kLowest = -0x7fffffffffffffffLL - 1;
  if (value != value) return kLowest;
  value += 0.0;
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits >= 0 ? bits : kLowest - bits;
}

// Of the subsets of `size` values with maximal variance, all of which are the i lowest and the size - i highest for
// some i: the i, the smallest that reaches the maximum but for rounding; 0 where a value is not finite. `sorted`
// ascends.
FLOWGRPO_HD int best_num_bottom(const double* sorted, int candidates, int size) {
  const double centre = sorted[candidates / 2];
  const double lowest = sorted[0] - centre, highest = sorted[candidates - 1] - centre, width = size;
  const double rounding = 1e-15 * width * width * width * (lowest * lowest + highest * highest);  // ten times the worst
  double sum = 0.0, squares = 0.0;
  for (int i = candidates - size; i < candidates; ++i) {
    const double value = sorted[i] - centre;
    sum += value;
    squares += value * value;
  }
  double best = size * squares - sum * sum;  // size^2 times the variance
  int best_i = 0;
  for (int i = 1; i <= size; ++i) {
    const double leaves = sorted[candidates - size + i - 1] - centre, enters = sorted[i - 1] - centre;
    sum += enters - leaves;
    squares += enters * enters - leaves * leaves;
    const double score = size * squares - sum * sum;
    if (score > best + rounding) {
      best = score;
      best_i = i;
    }
  }
  return best_i;
}

FLOWGRPO_HD int64_t clamped(int64_t index, int64_t size) { return index < 0 ? 0 : index < size ? index : size - 1; }

FLOWGRPO_DECLARE_OP(group_advantages, GroupAdvantagesArgs)
FLOWGRPO_DECLARE_OP(select_samples, SelectArgs)
FLOWGRPO_DECLARE_OP(pareto_fronts, ParetoFrontsArgs)
FLOWGRPO_DECLARE_OP(compact, CompactArgs)

FLOWGRPO_DECLARE_KERNEL(batch_std_column, GroupAdvantagesArgs)
FLOWGRPO_DECLARE_KERNEL(group_advantages_group, GroupAdvantagesArgs)
FLOWGRPO_DECLARE_KERNEL(group_advantages_batch, GroupAdvantagesArgs)

}  // namespace flowgrpo_fast
