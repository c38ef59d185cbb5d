// The ops on a transition on the CPU: chunks over the threads, then the ordered sums.
#include <vector>

#include "cpu_dispatch.h"
#include "flow_step.h"

namespace flowgrpo_fast::cpu {
namespace {

int64_t chunks_of(const Transition& transition) { return transition.batch * num_chunks(transition.elements); }

// Adds the partial sums of each sample in order and stores what they come to.
template <typename Real>
void store_sums(const Transition& transition, const double* partials,
                double (*value)(const Row<Real>&, double, int64_t), void* out) {
  const int64_t chunks = num_chunks(transition.elements);
  for (int64_t sample = 0; sample < transition.batch; ++sample) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[sample * chunks + chunk];
    static_cast<Real*>(out)[sample] =
        static_cast<Real>(value(row_of<Real>(transition, sample), sum, transition.elements));
  }
}

void store_log_prob(const Transition& transition, const double* partials, void* log_prob) {
  const DefaultFloatMode mode;
  transition.latents.dtype == DType::kFloat64 ? store_sums<double>(transition, partials, log_prob_of<double>, log_prob)
                                              : store_sums<float>(transition, partials, log_prob_of<float>, log_prob);
}

void store_drift(const Transition& transition, const double* partials, void* drift) {
  const DefaultFloatMode mode;
  transition.latents.dtype == DType::kFloat64 ? store_sums<double>(transition, partials, drift_of<double>, drift)
                                              : store_sums<float>(transition, partials, drift_of<float>, drift);
}

}  // namespace

void flow_step(const FlowStepArgs& args, int num_threads) {
  const Transition& transition = args.transition;
  std::vector<double> partials(static_cast<size_t>(chunks_of(transition)));
  FlowStepArgs work = args;
  work.partials = partials.data();
  run_items(FLOWGRPO_PICK(flow_step_chunk), work, chunks_of(transition), transition.batch * transition.elements,
            num_threads);
  store_log_prob(transition, partials.data(), args.log_prob);
}

void flow_log_prob(const FlowLogProbArgs& args, int num_threads) {
  const Transition& transition = args.transition;
  const int64_t chunks = num_chunks(transition.elements), count = chunks_of(transition);
  const bool with_drift = args.reference.velocity.data != nullptr;
  std::vector<double> partials(static_cast<size_t>(with_drift ? 2 * count : count));
  FlowLogProbArgs work = args;
  work.partials = partials.data();
  work.drift_partials = partials.data() + count;
  const auto chunk_kernel = FLOWGRPO_PICK(flow_log_prob_chunk), map_kernel = FLOWGRPO_PICK(flow_log_prob_map_tile);
  const bool map_alone = args.map.data && !args.mean && !with_drift;
  if (map_alone && !args.map.channels_last && 2 * transition.batch > num_threads) {
    // One pass over the inputs, a thread a sample: worth it where most threads have one.
    run_items(FLOWGRPO_PICK(flow_log_prob_map_sample), work, transition.batch, transition.batch * transition.elements,
              num_threads);
  } else if (args.map.data) {
    // A sample's map follows its chunks, which left its arrays in a cache where it fits one.
    const int64_t tiles = map_tiles(args.map), items = chunks + tiles;
    parallel_for(
        transition.batch * items, threads_for(transition.batch * transition.elements, num_threads), [&](int64_t index) {
          const int64_t sample = index / items, item = index % items;
          item < chunks ? chunk_kernel(work, sample * chunks + item) : map_kernel(work, sample * tiles + item - chunks);
        });
  } else {
    run_items(chunk_kernel, work, count, transition.batch * transition.elements, num_threads);
  }
  store_log_prob(transition, work.partials, args.log_prob);
  if (with_drift) store_drift(transition, work.drift_partials, args.drift);
}

void flow_log_prob_backward(const FlowLogProbBackwardArgs& args, int num_threads) {
  const Transition& transition = args.transition;
  run_items(FLOWGRPO_PICK(flow_log_prob_backward_chunk), args, chunks_of(transition),
            transition.batch * transition.elements, num_threads);
}

void philox(const PhiloxArgs& args, int num_threads) {
  run_items(FLOWGRPO_PICK(philox_chunk), args, args.batch * num_chunks(args.elements), args.batch * args.elements,
            num_threads);
}

}  // namespace flowgrpo_fast::cpu
