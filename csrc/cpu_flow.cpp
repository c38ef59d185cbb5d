// The ops on a transition on the CPU: chunks over the threads, then the ordered sums.
#include <vector>

#include "cpu_dispatch.h"
#include "flow_step.h"

namespace flowgrpo_fast::cpu {
namespace {

int64_t chunks_of(const Transition& transition) { return transition.batch * num_chunks(transition.elements); }

template <typename Real>
void store_log_prob(const Transition& transition, const double* partials, void* log_prob) {
  const int64_t chunks = num_chunks(transition.elements);
  for (int64_t sample = 0; sample < transition.batch; ++sample) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[sample * chunks + chunk];
    const Row<Real> row = row_of<Real>(transition, sample);
    static_cast<Real*>(log_prob)[sample] = static_cast<Real>(log_prob_of(row, sum, transition.elements));
  }
}

// Runs a kernel that leaves partial sums, then adds them in order.
template <typename Args>
void run_summed(void (*kernel)(const Args&, int64_t), Args args, int num_threads) {
  const Transition& transition = args.transition;
  std::vector<double> partials(static_cast<size_t>(chunks_of(transition)));
  args.partials = partials.data();
  run_items(kernel, args, chunks_of(transition), transition.batch * transition.elements, num_threads);
  const DefaultFloatMode mode;
  const bool is_double = transition.latents.dtype == DType::kFloat64;
  (is_double ? store_log_prob<double> : store_log_prob<float>)(transition, partials.data(), args.log_prob);
}

}  // namespace

void flow_step(const FlowStepArgs& args, int num_threads) {
  run_summed(FLOWGRPO_PICK(flow_step_chunk), args, num_threads);
}

void flow_log_prob(const FlowLogProbArgs& args, int num_threads) {
  run_summed(FLOWGRPO_PICK(flow_log_prob_chunk), args, num_threads);
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
