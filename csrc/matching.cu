// The residuals of velocity predictions and their backward on a GPU.
#include "cuda_group.cuh"
#include "matching.h"

namespace flowgrpo_fast::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

// Blocks that must fit a multiprocessor, which bounds the registers of a thread.
template <typename Real>
constexpr int kResident = sizeof(Real) == 8 ? 2 : 3;

// The weights of a group: one load where its elements share one or have neighbouring ones.
template <typename Real>
__device__ __forceinline__ void load_weights(const WeightMap& map, int64_t sample, const Group& group, Real* weights) {
  if (!map.data) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) weights[i] = 1;
    return;
  }
  const Real* source = static_cast<const Real*>(map.data) + sample * map.stride;
  if (group.vector && map.inner == 1 && map.shared % kGroup == 0) {
    const Real weight = source[weight_place(map, group.element)];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) weights[i] = weight;
  } else if (group.vector && map.inner % kGroup == 0) {
    const Real* first = source + weight_place(map, group.element);
    load_group(real_buffer<Real>(first), {0, 0, kGroup, true}, weights);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      weights[i] = i < group.count ? source[weight_place(map, group.element + i)] : Real(0);
    }
  }
}

// Adds what a group has to the sums of a thread. The reference velocity is loaded last: that saves registers.
template <Mode kMode, bool kReference, typename Real>
__device__ __forceinline__ void add_group(const Residuals& residuals, int64_t sample, const Group& group, Real* sums) {
  Real velocity[kGroup], target[kGroup], weight[kGroup], old[kGroup] = {};
  load_group(residuals.velocity, group, velocity);
  load_group(residuals.target, group, target);
  if (kMode != kOwn) load_group(residuals.old_velocity, group, old);
  load_weights(residuals.weight, sample, group, weight);
  const Real beta = static_cast<Real>(residuals.beta);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) add_means<kMode>(weight[i], velocity[i], target[i], old[i], beta, sums);
  if (!kReference) return;
  Real reference[kGroup];
  load_group(residuals.reference_velocity, group, reference);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    add_reference_means<kMode>(weight[i], velocity[i], target[i], reference[i], sums + own_means(kMode));
  }
}

// Every thread leaves its sums in shared memory, then a warp adds those of one mean.
template <typename Real, Mode kMode, bool kReference>
__global__ void __launch_bounds__(kThreads, kResident<Real>)
    matching_kernel(const __grid_constant__ MatchingArgs args, bool vector) {
  constexpr int kMeans = count_means(kMode, kReference);
  __shared__ Real shared[kMeans][kThreads];
  const Residuals& residuals = args.residuals;
  const ChunkRange range = chunk_range(residuals.elements);
  Real sums[kMeans] = {};
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, residuals.elements, vector);
    add_group<kMode, kReference>(residuals, range.sample, group, sums);
  }
#pragma unroll
  for (int mean = 0; mean < kMeans; ++mean) shared[mean][threadIdx.x] = sums[mean];
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int mean = warp; mean < kMeans; mean += kWarps) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += static_cast<double>(shared[mean][i * kWarp + lane]);
    sum = warp_sum(sum);
    if (lane == 0) args.partials[mean * static_cast<int64_t>(gridDim.x) + blockIdx.x] = sum;
  }
}

// One warp a mean and sample: lane l adds partials l, l + 32, ..., then the lanes are added as a tree.
template <typename Real>
__global__ void mean_kernel(const __grid_constant__ MatchingArgs args) {
  const Residuals& residuals = args.residuals;
  const int64_t chunks = num_chunks(residuals.elements);
  const double* partials = args.partials + blockIdx.x * chunks;
  double sum = 0.0;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kWarp) sum += partials[chunk];
  sum = warp_sum(sum);
  if (threadIdx.x == 0) {
    Real* means = static_cast<Real*>(args.means[blockIdx.x / residuals.batch]);
    means[blockIdx.x % residuals.batch] = static_cast<Real>(sum / static_cast<double>(residuals.elements));
  }
}

// Adds slope * (velocity - other) to the gradient.
template <typename Real>
__device__ __forceinline__ void add_slope(const Buffer& other, const Group& group, Real slope, const Real* velocity,
                                          Real* gradient) {
  Real values[kGroup];
  load_group(other, group, values);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) gradient[i] += slope * (velocity[i] - values[i]);
}

template <typename Real, bool kOld, bool kReference>
__global__ void __launch_bounds__(kThreads, kResident<Real>)
    matching_backward_kernel(const __grid_constant__ MatchingBackwardArgs args, bool vector) {
  const Residuals& residuals = args.residuals;
  const ChunkRange range = chunk_range(residuals.elements);
  const Slopes<Real> slopes = slopes_of<Real>(args, range.sample);
  for (int64_t element = range.first + threadIdx.x * kGroup; element < range.last; element += kThreads * kGroup) {
    const Group group = group_at(range, element, residuals.elements, vector);
    Real velocity[kGroup], gradient[kGroup], weight[kGroup];
    load_group(residuals.velocity, group, velocity);
    load_group(residuals.target, group, gradient);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient[i] = slopes.error * (velocity[i] - gradient[i]);
    if (kOld) add_slope(residuals.old_velocity, group, slopes.old, velocity, gradient);
    if (kReference) add_slope(residuals.reference_velocity, group, slopes.reference, velocity, gradient);
    load_weights(residuals.weight, range.sample, group, weight);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient[i] *= weight[i];
    store_group(args.grad_velocity, group, gradient);
  }
}

bool can_vectorize(const Residuals& residuals) {
  return residuals.elements % kGroup == 0 && aligned16(residuals.velocity.data) && aligned16(residuals.target.data) &&
         aligned16(residuals.old_velocity.data) && aligned16(residuals.reference_velocity.data) &&
         aligned16(residuals.weight.data);
}

template <typename Real>
auto kernel_for(const MatchingArgs& args) {
  const bool reference = args.residuals.reference_velocity.data != nullptr;
  switch (mode_of(args.residuals)) {
    case kOwn:
      return reference ? matching_kernel<Real, kOwn, true> : matching_kernel<Real, kOwn, false>;
    case kOld:
      return reference ? matching_kernel<Real, kOld, true> : matching_kernel<Real, kOld, false>;
    default:
      return reference ? matching_kernel<Real, kImplicit, true> : matching_kernel<Real, kImplicit, false>;
  }
}

template <typename Real>
auto kernel_for(const MatchingBackwardArgs& args) {
  const bool reference = args.grad_reference_drift != nullptr;
  if (needs_old(args)) {
    return reference ? matching_backward_kernel<Real, true, true> : matching_backward_kernel<Real, true, false>;
  }
  return reference ? matching_backward_kernel<Real, false, true> : matching_backward_kernel<Real, false, false>;
}

template <typename Real>
void launch(const MatchingArgs& args, void* stream) {
  const Residuals& residuals = args.residuals;
  const auto sum_kernel = kernel_for<Real>(args);
  FLOWGRPO_LAUNCH(sum_kernel, residuals.batch * num_chunks(residuals.elements), kThreads, stream, args,
                  can_vectorize(residuals));
  FLOWGRPO_LAUNCH(mean_kernel<Real>, num_means(residuals) * residuals.batch, kWarp, stream, args);
}

template <typename Real>
void launch_backward(const MatchingBackwardArgs& args, void* stream) {
  const Residuals& residuals = args.residuals;
  const auto gradient_kernel = kernel_for<Real>(args);
  FLOWGRPO_LAUNCH(gradient_kernel, residuals.batch * num_chunks(residuals.elements), kThreads, stream, args,
                  can_vectorize(residuals) && aligned16(args.grad_velocity.data));
}

}  // namespace

void matching(const MatchingArgs& args, void* stream) {
  const bool is_double = args.residuals.velocity.dtype == DType::kFloat64;
  is_double ? launch<double>(args, stream) : launch<float>(args, stream);
}

void matching_backward(const MatchingBackwardArgs& args, void* stream) {
  const bool is_double = args.residuals.velocity.dtype == DType::kFloat64;
  is_double ? launch_backward<double>(args, stream) : launch_backward<float>(args, stream);
}

}  // namespace flowgrpo_fast::cuda
