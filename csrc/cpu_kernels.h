// The CPU kernels, one copy an instruction set: the sources are compiled once for each, inside a namespace of that
// name. A kernel does one chunk of one sample; work item `index` is chunk `index % chunks` of sample `index / chunks`.
#pragma once

#include "flow_step.h"

#define FLOWGRPO_DECLARE_CPU_KERNELS(isa)                                                \
  namespace flowgrpo_fast::isa {                                                         \
  void flow_step_chunk(const FlowStepArgs& args, int64_t index);                         \
  void flow_log_prob_chunk(const FlowLogProbArgs& args, int64_t index);                  \
  void flow_log_prob_backward_chunk(const FlowLogProbBackwardArgs& args, int64_t index); \
  void philox_chunk(const PhiloxArgs& args, int64_t index);                              \
  }

FLOWGRPO_DECLARE_CPU_KERNELS(baseline)
FLOWGRPO_DECLARE_CPU_KERNELS(avx2)
FLOWGRPO_DECLARE_CPU_KERNELS(avx512)
