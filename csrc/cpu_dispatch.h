// Which instruction set runs, and what the drivers of the ops on the CPU (cpu_*.cpp) share.
#pragma once

#include <array>

#include "parallel.h"

namespace flowgrpo_fast::cpu {

// Instruction sets compiled in, weakest first, ending with a null pointer.
const char* const* compiled_isas();

// Place in that list of the one that runs: the best this processor has, or FLOWGRPO_FAST_ISA. Throws std::runtime_error
// for a bad value.
int chosen_isa();

// One copy of a kernel for the processor at hand.
#if defined(__x86_64__)
#define FLOWGRPO_PICK(kernel) \
  (std::array{baseline::kernel, avx2::kernel, avx512::kernel}[::flowgrpo_fast::cpu::chosen_isa()])
#else
#define FLOWGRPO_PICK(kernel) (baseline::kernel)
#endif

// Elements that are worth waking another thread for; under the sanitizers any number is.
#ifndef FLOWGRPO_WORTHWHILE
#define FLOWGRPO_WORTHWHILE 16384
#endif

inline int threads_for(int64_t elements, int num_threads) { return elements < FLOWGRPO_WORTHWHILE ? 1 : num_threads; }

// Runs a kernel on every one of `count` work items, which have `elements` elements together.
template <typename Args>
void run_items(void (*kernel)(const Args&, int64_t), const Args& args, int64_t count, int64_t elements,
               int num_threads) {
  parallel_for(count, threads_for(elements, num_threads), [&](int64_t index) { kernel(args, index); });
}

}  // namespace flowgrpo_fast::cpu
