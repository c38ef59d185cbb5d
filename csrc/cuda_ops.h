// The ops on a GPU: each launches on `stream` and returns at once. Nothing is allocated and nothing waits, so a call
// can be captured in a CUDA graph. Every pointer in the arguments is a device pointer; `partials` is workspace of the
// caller.
#pragma once

#include "flow_step.h"

namespace flowgrpo_fast::cuda {

// Makes a device current for the calling thread, and the previous one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

void flow_step(const FlowStepArgs& args, void* stream);
void flow_log_prob(const FlowLogProbArgs& args, void* stream);
void flow_log_prob_backward(const FlowLogProbBackwardArgs& args, void* stream);
void philox(const PhiloxArgs& args, void* stream);

}  // namespace flowgrpo_fast::cuda
