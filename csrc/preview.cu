// The preview and its Gram matrix on a GPU.
#include "cuda_group.cuh"
#include "preview.h"

namespace flowgrpo_fast::cuda {
namespace {

constexpr int kPreviewThreads = 128;
constexpr int kSlab = kPreviewThreads * kGroup;  // columns summed at a time

// Whole narrow rows share a block; a wide row has one, and goes through it slab by slab.
__host__ __device__ __forceinline__ uint32_t rows_a_block(const PreviewArgs& args) {
  const uint32_t columns = static_cast<uint32_t>(args.width * args.inner);
  return columns < kSlab ? kSlab / columns : 1;
}

// x0 summed down the lines of eight neighbouring columns, or of one.
template <typename Real, bool kVector>
__device__ __forceinline__ void sum_lines(const PreviewArgs& args, uint32_t place, uint32_t column, Real* sums) {
  const Transition& transition = args.transition;
  const uint32_t rows = static_cast<uint32_t>(preview_rows(args)), sample = place / rows;
  const int64_t line = args.width * args.inner, start = preview_start(args, place % rows) + column;
  const Row<Real> row = row_of<Real>(transition, sample);
  for (int64_t time = 0; time < args.pool_time; ++time) {
    for (int64_t height = 0; height < args.pool_height; ++height) {
      const int64_t element = start + (time * args.height + height) * line;
      const Group group = {element, sample * transition.elements + element, kVector ? kGroup : 1, kVector};
      MeanGroup<Real> tile;
      mean_group(transition, row, group, &tile);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sums[i] += x0_of(row, tile.latents[i], tile.velocity[i]);
    }
  }
}

template <typename Real, bool kVector>
__global__ void __launch_bounds__(kPreviewThreads, 5) preview_kernel(const __grid_constant__ PreviewArgs args) {
  constexpr int kStep = kVector ? kGroup : 1;
  __shared__ Real sums[kSlab];
  const uint32_t columns = static_cast<uint32_t>(args.width * args.inner);
  const uint32_t width = static_cast<uint32_t>(args.pool_width), inner = static_cast<uint32_t>(args.inner);
  const uint32_t first_row = blockIdx.x * rows_a_block(args);
  const uint32_t left = static_cast<uint32_t>(args.transition.batch * preview_rows(args)) - first_row;
  const uint32_t rows = left < rows_a_block(args) ? left : rows_a_block(args);
  const uint32_t all = rows * columns, cells = all / width;
  Real* pooled = static_cast<Real*>(args.pooled) + static_cast<int64_t>(first_row) * (columns / width);
  for (uint32_t slab = 0; slab < all; slab += kSlab) {
    const uint32_t end = all - slab < kSlab ? all : slab + kSlab;
    for (uint32_t column = slab + threadIdx.x * kStep; column < end; column += kPreviewThreads * kStep) {
      Real group[kGroup] = {};
      sum_lines<Real, kVector>(args, first_row + column / columns, column % columns, group);
#pragma unroll
      for (int i = 0; i < kStep; ++i) sums[column - slab + i] = group[i];
    }
    __syncthreads();
    for (uint32_t cell = threadIdx.x; cell < cells; cell += kPreviewThreads) {
      const uint32_t first = cell / inner * width * inner + cell % inner;
      Real sum = slab == 0 ? Real(0) : pooled[cell];
      for (uint32_t i = 0; i < width; ++i) {
        const uint32_t column = first + i * inner;
        if (column >= slab && column < end) sum += sums[column - slab];
      }
      pooled[cell] = end == all ? sum * cell_scale<Real>(args) : sum;
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
  const int64_t rows = args.transition.batch * preview_rows(args);
  checked_count("preview_kernel", "rows", rows);
  checked_count("preview_kernel", "columns", args.width * args.inner);
  const int64_t a_block = rows_a_block(args);
  const auto row_kernel = vector ? preview_kernel<Real, true> : preview_kernel<Real, false>;
  FLOWGRPO_LAUNCH(row_kernel, (rows + a_block - 1) / a_block, kPreviewThreads, stream, args);
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
