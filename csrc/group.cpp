// Advantages on the CPU, compiled once per instruction set.
#include "group.h"

#ifndef FLOWGRPO_ISA
#error "FLOWGRPO_ISA names the instruction set this file is compiled for"
#endif

namespace flowgrpo_fast::FLOWGRPO_ISA {

constexpr int kLanes = 8;

// Sum of term(0), ..., term(count - 1): lane i % 8 adds term(i), then the lanes are added in order.
template <typename Term>
static inline double sum_of(int64_t count, const Term& term) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += term(i);
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// Mean, formed around the first value, and population standard deviation.
static inline Scale moments(const double* values, int64_t count) {
  const double first = values[0], size = static_cast<double>(count);
  const double mean = first + sum_of(count, [&](int64_t i) { return values[i] - first; }) / size;
  const double squares = sum_of(count, [&](int64_t i) { return (values[i] - mean) * (values[i] - mean); });
  return {mean, sqrt(squares / size)};
}

// Item: a column.
void batch_std_column(const GroupAdvantagesArgs& args, int64_t column) {
  args.batch_std[column] = moments(args.values + column * args.batch, args.batch).divisor;
}

// Item: a group.
void group_advantages_group(const GroupAdvantagesArgs& args, int64_t group) {
  const int64_t first = args.first_member[group], last = args.first_member[group + 1];
  if (first == last) return;
  Scale scales[kMaxRewards];
  for (int column = 0; column < num_columns(args); ++column) {
    scales[column] = moments(args.values + column * args.batch + first, last - first);
    if (args.batch_scale) scales[column].divisor = args.batch_std[column];
    scales[column].divisor += args.eps;
  }
  for (int64_t i = first; i < last; ++i) {
    store_sample(args, args.members[i], scales, [&](int column) { return args.values[column * args.batch + i]; });
  }
}

// Item: the batch. The last z-score of kGdpo.
void group_advantages_batch(const GroupAdvantagesArgs& args, int64_t) {
  Scale scale = moments(args.combined, args.batch);
  scale.divisor += args.eps;
  for (int64_t sample = 0; sample < args.batch; ++sample) {
    store_real(args.advantages, sample, clipped(args, z_score(args.combined[sample], scale)));
  }
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
