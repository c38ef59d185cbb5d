// The ops on the CPU. Compiled once, for the baseline: only the kernels themselves use wider instructions.
#include "cpu_ops.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_kernels.h"
#include "parallel.h"

namespace flowgrpo_fast::cpu {
namespace {

[[maybe_unused]] const bool kForksWatched = ThreadPool::watch_forks();

struct Kernels {
  const char* isa;
  void (*flow_step)(const FlowStepArgs&, int64_t);
  void (*flow_log_prob)(const FlowLogProbArgs&, int64_t);
  void (*flow_log_prob_backward)(const FlowLogProbBackwardArgs&, int64_t);
  void (*philox)(const PhiloxArgs&, int64_t);
};

#define FLOWGRPO_CPU_KERNELS(isa) \
  {#isa, isa::flow_step_chunk, isa::flow_log_prob_chunk, isa::flow_log_prob_backward_chunk, isa::philox_chunk}

#if defined(__x86_64__)
constexpr Kernels kKernels[] = {FLOWGRPO_CPU_KERNELS(baseline), FLOWGRPO_CPU_KERNELS(avx2),
                                FLOWGRPO_CPU_KERNELS(avx512)};
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", nullptr};

bool supported(const Kernels& kernels) {
  if (!std::strcmp(kernels.isa, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return !std::strcmp(kernels.isa, "baseline") || __builtin_cpu_supports("avx2");
}
#else
constexpr Kernels kKernels[] = {FLOWGRPO_CPU_KERNELS(baseline)};
constexpr const char* kIsaNames[] = {"baseline", nullptr};

bool supported(const Kernels&) { return true; }
#endif

const Kernels& choose() {
  const char* wanted = std::getenv("FLOWGRPO_FAST_ISA");
  const Kernels* best = nullptr;
  std::string usable;
  for (const Kernels& kernels : kKernels) {
    if (!supported(kernels)) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(kernels.isa);
    if (!wanted || !*wanted || !std::strcmp(wanted, kernels.isa)) best = &kernels;
  }
  if (!best) {
    throw std::runtime_error("FLOWGRPO_FAST_ISA is '" + std::string(wanted) + "', must be one of: " + usable +
                             " (what this build and this processor have)");
  }
  return *best;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

// Small work is not worth waking another thread for.
int threads_for(int64_t batch, int64_t elements, int num_threads) {
  constexpr int64_t kWorthwhile = 16384;
  return batch * elements < kWorthwhile ? 1 : num_threads;
}

template <typename Args>
void run_chunks(void (*kernel)(const Args&, int64_t), const Args& args, const Transition& transition, int num_threads) {
  const int threads = threads_for(transition.batch, transition.elements, num_threads);
  parallel_for(transition.batch * num_chunks(transition.elements), threads,
               [&](int64_t index) { kernel(args, index); });
}

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
  std::vector<double> partials(static_cast<size_t>(transition.batch * num_chunks(transition.elements)));
  args.partials = partials.data();
  run_chunks(kernel, args, transition, num_threads);
  const DefaultFloatMode mode;
  const bool is_double = transition.latents.dtype == DType::kFloat64;
  (is_double ? store_log_prob<double> : store_log_prob<float>)(transition, partials.data(), args.log_prob);
}

}  // namespace

const char* const* compiled_isas() { return kIsaNames; }
const char* chosen_isa() { return kernels().isa; }

void flow_step(const FlowStepArgs& args, int num_threads) { run_summed(kernels().flow_step, args, num_threads); }

void flow_log_prob(const FlowLogProbArgs& args, int num_threads) {
  run_summed(kernels().flow_log_prob, args, num_threads);
}

void flow_log_prob_backward(const FlowLogProbBackwardArgs& args, int num_threads) {
  run_chunks(kernels().flow_log_prob_backward, args, args.transition, num_threads);
}

void philox(const PhiloxArgs& args, int num_threads) {
  const auto kernel = kernels().philox;
  parallel_for(args.batch * num_chunks(args.elements), threads_for(args.batch, args.elements, num_threads),
               [&](int64_t index) { kernel(args, index); });
}

}  // namespace flowgrpo_fast::cpu
