// The preview and its Gram matrix on the CPU, compiled once per instruction set.
#include "preview.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

constexpr int kColumns = 4096;  // of a row, summed at a time: its lines are then read as they lie in memory
constexpr int kBlock = 32;      // columns added in vector registers

// `count` values of an array in the arithmetic dtype: the array itself where it is that, else `scratch`.
static inline const float* read_run(const Buffer& buffer, int64_t offset, int count, float* scratch) {
  if (buffer.dtype == DType::kFloat32) return static_cast<const float*>(buffer.data) + offset;
  const uint16_t* source = static_cast<const uint16_t*>(buffer.data) + offset;
  buffer.dtype == DType::kBFloat16 ? widen_bfloat16(source, scratch, count) : widen_float16(source, scratch, count);
  return scratch;
}

static inline const double* read_run(const Buffer& buffer, int64_t offset, int, double*) {
  return static_cast<const double*>(buffer.data) + offset;
}

// A line's arrays, from its first column on. The negative velocity is optional.
template <typename Stored>
struct Line {
  const Stored *latents, *velocity, *negative;
};

// Adds x0 of `count` neighbouring columns from `first`.
template <typename Stored, typename Real>
static inline __attribute__((always_inline)) void add_x0(const Row<Real>& row, Real scale, const Line<Stored>& line,
                                                         int first, int count, Real* __restrict__ sums) {
  const Stored *latents = line.latents + first, *velocity = line.velocity + first;
  if (!line.negative) {
    for (int i = 0; i < count; ++i) sums[i] += x0_of<Real>(row, widened(latents[i]), widened(velocity[i]));
    return;
  }
  const Stored* negative = line.negative + first;
  for (int i = 0; i < count; ++i) {
    const Real mixed = guided<Real>(widened(velocity[i]), widened(negative[i]), scale);
    sums[i] += x0_of<Real>(row, widened(latents[i]), mixed);
  }
}

// Adds x0 of a line in blocks. The last block has sums of its own, because it overlaps the one before.
template <typename Stored, typename Real>
static inline void add_line(const Row<Real>& row, Real scale, const Line<Stored>& line, int count, Real* sums,
                            Real* last) {
  if (count < kBlock) return add_x0(row, scale, line, 0, count, sums);
  int first = 0;
  for (; first + kBlock <= count; first += kBlock) add_x0(row, scale, line, first, kBlock, sums + first);
  if (first < count) add_x0(row, scale, line, count - kBlock, kBlock, last);
}

// Sums x0 down the lines of a row, over `count` columns from `offset`. Lines are read as they lie in memory.
template <typename Real>
static void sum_lines(const PreviewArgs& args, const Row<Real>& row, int64_t offset, int count, Real* sums) {
  const Buffer &latents = args.transition.latents, &velocity = args.transition.velocity;
  const Buffer& negative = args.transition.negative_velocity;
  const bool is_bfloat16 = latents.dtype == DType::kBFloat16 && velocity.dtype == DType::kBFloat16;
  const Real scale = static_cast<Real>(args.transition.guidance_scale);
  Real scratch[3][kColumns], last[kBlock] = {};
  for (int i = 0; i < count; ++i) sums[i] = 0;
  for (int64_t time = 0; time < args.pool_time; ++time) {
    for (int64_t height = 0; height < args.pool_height; ++height) {
      const int64_t start = offset + (time * args.height + height) * args.width * args.inner;
      if (is_bfloat16) {
        const auto stored = [&](const Buffer& buffer) { return static_cast<const Bfloat16*>(buffer.data) + start; };
        const Line<Bfloat16> line = {stored(latents), stored(velocity), negative.data ? stored(negative) : nullptr};
        add_line(row, scale, line, count, sums, last);
      } else {
        const auto real = [&](const Buffer& buffer, int k) { return read_run(buffer, start, count, scratch[k]); };
        const Line<Real> line = {real(latents, 0), real(velocity, 1), negative.data ? real(negative, 2) : nullptr};
        add_line(row, scale, line, count, sums, last);
      }
    }
  }
  if (count < kBlock || count % kBlock == 0) return;
  for (int i = 0; i < kBlock; ++i) sums[count - kBlock + i] = last[i];
}

// Means of whole cells from the sums of their columns. kWidth is 0 where the width is known at run time only.
template <int kWidth, typename Real>
static inline void mean_of_cells(const Real* sums, int64_t count, int64_t pool_width, Real scale, Real* cells) {
  const int64_t width = kWidth ? kWidth : pool_width;
  for (int64_t cell = 0; cell < count; ++cell) {
    Real sum = 0;
    for (int64_t i = 0; i < width; ++i) sum += sums[cell * width + i];
    cells[cell] = sum * scale;
  }
}

// Rows of whole cells, whose columns fit together into the space for sums.
template <typename Real>
static void narrow_rows(const PreviewArgs& args, const Row<Real>& row, int64_t sample, int64_t first, int64_t last,
                        Real* pooled) {
  Real sums[kRunColumns];
  for (int64_t i = first; i < last; ++i) {
    const int64_t offset = sample * args.transition.elements + preview_start(args, i);
    sum_lines(args, row, offset, static_cast<int>(args.width), sums + (i - first) * args.width);
  }
  const int64_t count = (last - first) * (args.width / args.pool_width);
  const Real scale = cell_scale<Real>(args);
  switch (args.pool_width) {
    case 2:
      return mean_of_cells<2>(sums, count, 2, scale, pooled);
    case 4:
      return mean_of_cells<4>(sums, count, 4, scale, pooled);
    case 8:
      return mean_of_cells<8>(sums, count, 8, scale, pooled);
    default:
      return mean_of_cells<0>(sums, count, args.pool_width, scale, pooled);
  }
}

// Adds columns [first, first + count) of a row to the cells they belong to.
template <typename Real>
static void add_to_cells(const PreviewArgs& args, int64_t first, int count, const Real* sums, Real* cells) {
  const int64_t position = first / args.inner;
  int64_t place = position % args.pool_width, channel = first % args.inner;
  Real* cell = cells + position / args.pool_width * args.inner;
  for (int i = 0; i < count;) {
    const int left = count - i;
    const int run = args.inner - channel < left ? static_cast<int>(args.inner - channel) : left;
    for (int k = 0; k < run; ++k) cell[channel + k] += sums[i + k];
    i += run;
    channel += run;
    if (channel < args.inner) continue;
    channel = 0;
    if (++place == args.pool_width) place = 0, cell += args.inner;
  }
}

// A row of any width, piece by piece.
template <typename Real>
static void wide_row(const PreviewArgs& args, const Row<Real>& row, int64_t offset, Real* pooled) {
  const int64_t columns = args.width * args.inner, cells = columns / args.pool_width;
  for (int64_t i = 0; i < cells; ++i) pooled[i] = 0;
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int count = static_cast<int>(columns - first < kColumns ? columns - first : kColumns);
    Real sums[kColumns];
    sum_lines(args, row, offset + first, count, sums);
    add_to_cells(args, first, count, sums, pooled);
  }
  const Real scale = cell_scale<Real>(args);
  for (int64_t i = 0; i < cells; ++i) pooled[i] *= scale;
}

template <typename Real>
static void preview_rows_of(const PreviewArgs& args, int64_t index) {
  const int64_t rows = preview_rows(args), runs = preview_runs(args), sample = index / runs;
  const int64_t rows_a_run = preview_rows_a_run(args), columns = args.width * args.inner;
  const int64_t first = index % runs * rows_a_run, last = first + rows_a_run < rows ? first + rows_a_run : rows;
  const Row<Real> row = row_of<Real>(args.transition, sample);
  Real* pooled = static_cast<Real*>(args.pooled) + (sample * rows + first) * (columns / args.pool_width);
  if (args.inner == 1 && columns <= kRunColumns) return narrow_rows(args, row, sample, first, last, pooled);
  wide_row(args, row, sample * args.transition.elements + preview_start(args, first), pooled);
}

// Takes the group's mean off kGramTile features of all its members.
template <typename Real>
static void centre(const GramArgs& args, int64_t offset, int count) {
  const Real* pooled = static_cast<const Real*>(args.pooled.data) + offset;
  Real* centred = static_cast<Real*>(args.centred) + offset;
  double sums[kGramTile] = {};
  for (int64_t member = 0; member < args.group_size; ++member) {
    for (int i = 0; i < count; ++i) sums[i] += static_cast<double>(pooled[member * args.features + i]);
  }
  Real mean[kGramTile];
  for (int i = 0; i < count; ++i) mean[i] = static_cast<Real>(sums[i] / static_cast<double>(args.group_size));
  for (int64_t member = 0; member < args.group_size; ++member) {
    for (int i = 0; i < count; ++i) {
      centred[member * args.features + i] = pooled[member * args.features + i] - mean[i];
    }
  }
}

template <typename Real>
static double inner_product(const Real* left, const Real* right, int count) {
  constexpr int kWide = 32;  // as many sums as hide the latency of an addition
  double folded[kWide] = {};
  const int whole = count - count % kWide;
  for (int start = 0; start < whole; start += kWide) {
    for (int i = 0; i < kWide; ++i) folded[i] += static_cast<double>(left[start + i] * right[start + i]);
  }
  for (int i = whole; i < count; ++i) folded[i - whole] += static_cast<double>(left[i] * right[i]);
  for (int half = kWide / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) folded[i] += folded[half + i];
  }
  return folded[0];
}

// What kGramTile features of a group add to the entries of its lower triangle.
template <typename Real>
static void gram_tile_of(const GramArgs& args, int64_t index) {
  const int64_t size = args.group_size, features = args.features, group = index / args.num_tiles;
  const int64_t first = (args.first_tile + index % args.num_tiles) * kGramTile;
  const int64_t offset = group * size * features + first;
  const int count = static_cast<int>(features - first < kGramTile ? features - first : kGramTile);
  centre<Real>(args, offset, count);
  const Real* centred = static_cast<const Real*>(args.centred) + offset;
  double* partial = args.partials + index * size * size;
  for (int64_t member = 0; member < size; ++member) {
    for (int64_t other = 0; other <= member; ++other) {
      partial[member * size + other] = inner_product(centred + member * features, centred + other * features, count);
    }
  }
}

// Adds the tiles of a round to a member's entries in order, and mirrors them.
template <typename Real>
static void gram_row_of(const GramArgs& args, int64_t index) {
  const int64_t size = args.group_size, tiles = args.num_tiles, group = index / size, member = index % size;
  Real* gram = static_cast<Real*>(args.gram) + group * size * size;
  for (int64_t other = 0; other <= member; ++other) {
    double sum = args.sums[index * size + other];
    for (int64_t tile = group * tiles; tile < (group + 1) * tiles; ++tile) {
      sum += args.partials[(tile * size + member) * size + other];
    }
    args.sums[index * size + other] = sum;
    gram[member * size + other] = gram[other * size + member] = static_cast<Real>(sum);
  }
}

void preview_run(const PreviewArgs& args, int64_t index) {
  const bool is_double = args.transition.latents.dtype == DType::kFloat64;
  is_double ? preview_rows_of<double>(args, index) : preview_rows_of<float>(args, index);
}

void gram_tile(const GramArgs& args, int64_t index) {
  args.pooled.dtype == DType::kFloat64 ? gram_tile_of<double>(args, index) : gram_tile_of<float>(args, index);
}

void gram_row(const GramArgs& args, int64_t index) {
  args.pooled.dtype == DType::kFloat64 ? gram_row_of<double>(args, index) : gram_row_of<float>(args, index);
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
