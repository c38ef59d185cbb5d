// The ops on the CPU: chunks over the thread pool, then the ordered sums. Which instruction set runs is decided here.
#pragma once

#include "flow_step.h"

namespace flowgrpo_fast::cpu {

// Instruction sets compiled in, weakest first, ending with a null pointer.
const char* const* compiled_isas();

// The one that runs: the best this processor has, or FLOWGRPO_FAST_ISA. Throws std::runtime_error for a bad value.
const char* chosen_isa();

void flow_step(const FlowStepArgs& args, int num_threads);
void flow_log_prob(const FlowLogProbArgs& args, int num_threads);
void flow_log_prob_backward(const FlowLogProbBackwardArgs& args, int num_threads);
void philox(const PhiloxArgs& args, int num_threads);

}  // namespace flowgrpo_fast::cpu
