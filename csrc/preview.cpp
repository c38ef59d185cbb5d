// The preview and its Gram matrix on the CPU, compiled once per instruction set.
#include "preview.h"

#include "cpu_tile.h"

namespace flowgrpo_fast::FLOWGRPO_ISA {

constexpr int kColumns = 4096;  // of a row, summed at a time: its lines are then read as they lie in memory

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

// Adds x0 of `count` neighbouring elements. The negative velocity is optional.
template <typename Stored, typename Real>
static inline void add_x0(const Row<Real>& row, Real scale, const Stored* latents, const Stored* velocity,
                          const Stored* negative, int count, Real* sums) {
  if (!negative) {
    for (int i = 0; i < count; ++i) sums[i] += x0_of<Real>(row, widened(latents[i]), widened(velocity[i]));
    return;
  }
  for (int i = 0; i < count; ++i) {
    const Real mixed = guided<Real>(widened(velocity[i]), widened(negative[i]), scale);
    sums[i] += x0_of<Real>(row, widened(latents[i]), mixed);
  }
}

// Adds x0 down the lines of a row, over `count` columns from `offset`.
template <typename Real>
static void sum_lines(const PreviewArgs& args, const Row<Real>& row, int64_t offset, int count, Real* sums) {
  const Buffer &latents = args.transition.latents, &velocity = args.transition.velocity;
  const Buffer& negative = args.transition.negative_velocity;
  const bool is_bfloat16 = latents.dtype == DType::kBFloat16 && velocity.dtype == DType::kBFloat16;
  const Real scale = static_cast<Real>(args.transition.guidance_scale);
  Real scratch[3][kColumns];
  for (int64_t time = 0; time < args.pool_time; ++time) {
    for (int64_t height = 0; height < args.pool_height; ++height) {
      const int64_t start = offset + (time * args.height + height) * args.width * args.inner;
      if (is_bfloat16) {
        const auto stored = [&](const Buffer& buffer) { return static_cast<const Bfloat16*>(buffer.data) + start; };
        add_x0(row, scale, stored(latents), stored(velocity), negative.data ? stored(negative) : nullptr, count, sums);
      } else {
        const auto real = [&](const Buffer& buffer, int k) { return read_run(buffer, start, count, scratch[k]); };
        add_x0(row, scale, real(latents, 0), real(velocity, 1), negative.data ? real(negative, 2) : nullptr, count,
               sums);
      }
    }
  }
}

// Adds neighbouring columns to whole cells of a known width.
template <int kWidth, typename Real>
static void add_to_whole_cells(int count, const Real* sums, Real* cells) {
  for (int cell = 0; cell < count / kWidth; ++cell) {
    Real sum = cells[cell];
    for (int i = 0; i < kWidth; ++i) sum += sums[cell * kWidth + i];
    cells[cell] = sum;
  }
}

// Adds columns [first, first + count) of a row to the cells they belong to.
template <typename Real>
static void add_to_cells(const PreviewArgs& args, int64_t first, int count, const Real* sums, Real* cells) {
  const int64_t position = first / args.inner;
  int64_t place = position % args.pool_width, channel = first % args.inner;
  Real* cell = cells + position / args.pool_width * args.inner;
  if (args.inner == 1 && place == 0 && count % args.pool_width == 0) {
    if (args.pool_width == 2) return add_to_whole_cells<2>(count, sums, cell);
    if (args.pool_width == 4) return add_to_whole_cells<4>(count, sums, cell);
    if (args.pool_width == 8) return add_to_whole_cells<8>(count, sums, cell);
  }
  for (int i = 0; i < count;) {
    const int left = count - i;
    const int64_t wanted = args.inner == 1 ? args.pool_width - place : args.inner - channel;
    const int run = wanted < left ? static_cast<int>(wanted) : left;
    i += run;
    if (args.inner == 1) {
      Real sum = *cell;
      for (int k = i - run; k < i; ++k) sum += sums[k];
      *cell++ = sum;
      place = 0;
      continue;
    }
    for (int k = 0; k < run; ++k) cell[channel + k] += sums[i - run + k];
    channel += run;
    if (channel < args.inner) continue;
    channel = 0;
    if (++place == args.pool_width) place = 0, cell += args.inner;
  }
}

template <typename Real>
static void preview_row_of(const PreviewArgs& args, int64_t index) {
  const int64_t rows = preview_rows(args), sample = index / rows;
  const Row<Real> row = row_of<Real>(args.transition, sample);
  const int64_t start = sample * args.transition.elements + preview_start(args, index % rows);
  const int64_t columns = args.width * args.inner, cells = columns / args.pool_width;
  Real* pooled = static_cast<Real*>(args.pooled) + index * cells;
  for (int64_t i = 0; i < cells; ++i) pooled[i] = 0;
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int count = static_cast<int>(columns - first < kColumns ? columns - first : kColumns);
    Real sums[kColumns];
    for (int i = 0; i < count; ++i) sums[i] = 0;
    sum_lines(args, row, start + first, count, sums);
    add_to_cells(args, first, count, sums, pooled);
  }
  const Real scale = cell_scale<Real>(args);
  for (int64_t i = 0; i < cells; ++i) pooled[i] *= scale;
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
  for (int64_t member = 0; member < args.group_size; ++member) {
    for (int i = 0; i < count; ++i) {
      const Real mean = static_cast<Real>(sums[i] / static_cast<double>(args.group_size));
      centred[member * args.features + i] = pooled[member * args.features + i] - mean;
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
  const int64_t size = args.group_size, features = args.features, tiles = gram_tiles(args);
  const int64_t group = index / tiles, first = index % tiles * kGramTile;
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

// Adds the tiles of a member's entries in order, and mirrors them.
template <typename Real>
static void gram_row_of(const GramArgs& args, int64_t index) {
  const int64_t size = args.group_size, tiles = gram_tiles(args), group = index / size, member = index % size;
  Real* gram = static_cast<Real*>(args.gram) + group * size * size;
  for (int64_t other = 0; other <= member; ++other) {
    double sum = 0.0;
    for (int64_t tile = group * tiles; tile < (group + 1) * tiles; ++tile) {
      sum += args.partials[(tile * size + member) * size + other];
    }
    gram[member * size + other] = gram[other * size + member] = static_cast<Real>(sum);
  }
}

void preview_row(const PreviewArgs& args, int64_t index) {
  const bool is_double = args.transition.latents.dtype == DType::kFloat64;
  is_double ? preview_row_of<double>(args, index) : preview_row_of<float>(args, index);
}

void gram_tile(const GramArgs& args, int64_t index) {
  args.pooled.dtype == DType::kFloat64 ? gram_tile_of<double>(args, index) : gram_tile_of<float>(args, index);
}

void gram_row(const GramArgs& args, int64_t index) {
  args.pooled.dtype == DType::kFloat64 ? gram_row_of<double>(args, index) : gram_row_of<float>(args, index);
}

}  // namespace flowgrpo_fast::FLOWGRPO_ISA
