// Chooses the instruction set. Compiled for the baseline, as are all drivers: only kernels use wider instructions.
#include "cpu_dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flowgrpo_fast::cpu {
namespace {

[[maybe_unused]] const bool kForksWatched = ThreadPool::watch_forks();

#if defined(__x86_64__)
constexpr const char* kIsas[] = {"baseline", "avx2", "avx512", nullptr};

bool supported(const char* isa) {
  if (!std::strcmp(isa, "avx512")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return !std::strcmp(isa, "baseline") || __builtin_cpu_supports("avx2");
}
#else
constexpr const char* kIsas[] = {"baseline", nullptr};

bool supported(const char*) { return true; }
#endif

int choose() {
  const char* wanted = std::getenv("FLOWGRPO_FAST_ISA");
  int best = -1;
  std::string usable;
  for (int i = 0; kIsas[i]; ++i) {
    if (!supported(kIsas[i])) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(kIsas[i]);
    if (!wanted || !*wanted || !std::strcmp(wanted, kIsas[i])) best = i;
  }
  if (best < 0) {
    throw std::runtime_error("FLOWGRPO_FAST_ISA is '" + std::string(wanted) + "', must be one of: " + usable +
                             " (what this build and this processor have)");
  }
  return best;
}

}  // namespace

const char* const* compiled_isas() { return kIsas; }

int chosen_isa() {
  static const int chosen = choose();
  return chosen;
}

}  // namespace flowgrpo_fast::cpu
