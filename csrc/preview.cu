// The preview and its Gram matrix on a GPU.
#include "preview.h"

#include "cuda_group.cuh"

namespace flowgrpo_fast::cuda {
namespace {

constexpr int kPreviewThreads = 128;
constexpr int kSlab = kPreviewThreads * kGroup;  // columns summed at a time

// Whole narrow rows share a block; a wide row has one, and goes through it slab by slab.
struct Rows {
  int64_t a_block, blocks;
};

__host__ __device__ __forceinline__ Rows rows_of(const PreviewArgs& args) {
  const int64_t columns = args.width * args.inner, rows = args.transition.batch * preview_rows(args);
  const int64_t a_block = columns < kSlab ? kSlab / columns : 1;
  return {a_block, (rows + a_block - 1) / a_block};
}

// x0 summed down the lines of up to eight neighbouring columns.
template <typename Real>
__device__ __forceinline__ void sum_lines(const PreviewArgs& args, int64_t place, int64_t column, int count,
                                          bool vector, Real* sums) {
  const Transition& transition = args.transition;
  const int64_t rows = preview_rows(args), sample = place / rows, line = args.width * args.inner;
  const int64_t start = preview_start(args, place % rows) + column;
  const Row<Real> row = row_of<Real>(transition, sample);
  for (int64_t time = 0; time < args.pool_time; ++time) {
#pragma unroll 1
    for (int64_t height = 0; height < args.pool_height; ++height) {
      const int64_t element = start + (time * args.height + height) * line;
      const Group group = {element, sample * transition.elements + element, count, vector};
      MeanGroup<Real> tile;
      mean_group(transition, row, group, &tile);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sums[i] += x0_of(row, tile.latents[i], tile.velocity[i]);
    }
  }
}

template <typename Real>
__global__ void __launch_bounds__(kPreviewThreads)
    preview_kernel(const __grid_constant__ PreviewArgs args, bool vector) {
  __shared__ Real sums[kSlab];
  const int64_t columns = args.width * args.inner, cells = columns / args.pool_width;
  const int64_t all = args.transition.batch * preview_rows(args), a_block = rows_of(args).a_block;
  const int64_t first_row = blockIdx.x * a_block;
  const int64_t rows = all - first_row < a_block ? all - first_row : a_block;
  const int step = vector ? kGroup : 1;
  Real* pooled = static_cast<Real*>(args.pooled) + first_row * cells;
  for (int64_t slab = 0; slab < rows * columns; slab += kSlab) {
    const int64_t end = rows * columns - slab < kSlab ? rows * columns : slab + kSlab;
    for (int64_t column = slab + threadIdx.x * step; column < end; column += kPreviewThreads * step) {
      Real group[kGroup] = {};
      sum_lines(args, first_row + column / columns, column % columns, step, vector, group);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < step) sums[column - slab + i] = group[i];
      }
    }
    __syncthreads();
    for (int64_t cell = threadIdx.x; cell < rows * cells; cell += kPreviewThreads) {
      const int64_t first = cell / args.inner * args.pool_width * args.inner + cell % args.inner;
      Real sum = slab == 0 ? Real(0) : pooled[cell];
      for (int64_t i = 0; i < args.pool_width; ++i) {
        const int64_t column = first + i * args.inner;
        if (column >= slab && column < end) sum += sums[column - slab];
      }
      pooled[cell] = end == rows * columns ? sum * cell_scale<Real>(args) : sum;
    }
    __syncthreads();
  }
}

// A thread a feature of a group.
template <typename Real>
__global__ void __launch_bounds__(kThreads) centre_kernel(const __grid_constant__ GramArgs args) {
  const int64_t place = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (place >= args.groups * args.features) return;
  const int64_t offset = place / args.features * args.group_size * args.features + place % args.features;
  const Real* pooled = static_cast<const Real*>(args.pooled.data) + offset;
  Real* centred = static_cast<Real*>(args.centred) + offset;
  double sum = 0.0;
  for (int64_t member = 0; member < args.group_size; ++member) {
    sum += static_cast<double>(pooled[member * args.features]);
  }
  const Real mean = static_cast<Real>(sum / static_cast<double>(args.group_size));
  for (int64_t member = 0; member < args.group_size; ++member) {
    centred[member * args.features] = pooled[member * args.features] - mean;
  }
}

// A block an entry of the lower triangle, which it also mirrors.
template <typename Real>
__global__ void __launch_bounds__(kThreads) gram_kernel(const __grid_constant__ GramArgs args) {
  const int64_t size = args.group_size, group = blockIdx.x / (size * size);
  const int64_t member = blockIdx.x / size % size, other = blockIdx.x % size;
  if (other > member) return;  // all threads of the block
  const Real* centred = static_cast<const Real*>(args.centred) + group * size * args.features;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < args.features; i += kThreads) {
    sum += static_cast<double>(centred[member * args.features + i] * centred[other * args.features + i]);
  }
  const double total = block_sum(sum);
  if (threadIdx.x != 0) return;
  Real* gram = static_cast<Real*>(args.gram) + group * size * size;
  gram[member * size + other] = gram[other * size + member] = static_cast<Real>(total);
}

template <typename Real>
void launch(const PreviewArgs& args, void* stream) {
  const bool vector = can_vectorize(args.transition) && args.width * args.inner % kGroup == 0;
  FLOWGRPO_LAUNCH(preview_kernel<Real>, rows_of(args).blocks, kPreviewThreads, stream, args, vector);
}

template <typename Real>
void launch_gram(const GramArgs& args, void* stream) {
  const int64_t places = args.groups * args.features, entries = args.groups * args.group_size * args.group_size;
  FLOWGRPO_LAUNCH(centre_kernel<Real>, (places + kThreads - 1) / kThreads, kThreads, stream, args);
  FLOWGRPO_LAUNCH(gram_kernel<Real>, entries, kThreads, stream, args);
}

}  // namespace

void preview(const PreviewArgs& args, void* stream) {
  args.transition.latents.dtype == DType::kFloat64 ? launch<double>(args, stream) : launch<float>(args, stream);
}

void gram(const GramArgs& args, void* stream) {
  args.pooled.dtype == DType::kFloat64 ? launch_gram<double>(args, stream) : launch_gram<float>(args, stream);
}

}  // namespace flowgrpo_fast::cuda
