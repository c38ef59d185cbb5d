// The ops on a transition: flow_step, flow_log_prob and their noise.
#pragma once

#include <array>

#include "bind_transition.h"

namespace flowgrpo_fast {
namespace {

// outputs = (next_latents, log_prob, x0_pred or None, workspace or None)
void flow_step(const py::tuple& fields, const Tensor& seed, const py::tuple& outputs, int num_threads) {
  const TransitionParser parsed("flow_step", fields);
  parsed.per_sample("seed", seed);
  parsed.check.int64("seed", seed);
  has_fields(parsed.check, "outputs", outputs, 4);
  FlowStepArgs args{};
  args.transition = parsed.transition;
  args.seed = seed.data<int64_t>();
  args.next_latents = parsed.per_element("next_latents", tensor_at(outputs, 0), parsed.transition.latents.dtype);
  args.log_prob = parsed.per_sample_real("log_prob", tensor_at(outputs, 1));
  args.x0_pred = parsed.optional_per_element("x0_pred", tensor_at(outputs, 2), parsed.real);
  args.partials = parsed.workspace(tensor_at(outputs, 3));
  run(parsed.latents, args, num_threads, cpu::flow_step, FLOWGRPO_ON_CUDA(flow_step));
}

// A log-probability map laid out around the channel axis of the latents, 1 or the last one.
PositionMap position_map(const TransitionParser& parsed, const char* argument, const Tensor& tensor, int axis) {
  if (tensor.is_none()) return {};
  const int last = parsed.latents.ndim() - 1;
  if (axis != 1 && axis != last) parsed.check.fail("map_axis", "is " + std::to_string(axis), "be 1 or the last axis");
  PositionMap map{};
  map.channels = parsed.latents.size(axis);
  map.positions = parsed.transition.elements / map.channels;
  map.channels_last = axis == last;
  map.data = parsed.real_array(argument, tensor, parsed.transition.batch * map.positions);
  return map;
}

Reference reference_of(const TransitionParser& parsed, const Tensor& velocity, const Tensor& negative) {
  Reference reference{};
  if (!velocity.is_none()) reference.velocity = parsed.per_element("extras.reference_velocity", velocity);
  if (!negative.is_none()) {
    reference.negative = parsed.per_element("extras.reference_negative", negative, reference.velocity.dtype);
  }
  return reference;
}

// outputs = (log_prob, workspace or None); extras = () or (mean or None, reference_velocity or None,
// reference_negative or None, drift or None, its workspace or None, log_prob_map or None, map_axis)
void flow_log_prob(const py::tuple& fields, const Tensor& next_latents, const py::tuple& outputs,
                   const py::tuple& extras, int num_threads) {
  const TransitionParser parsed("flow_log_prob", fields);
  has_fields(parsed.check, "outputs", outputs, 2);
  FlowLogProbArgs args{};
  args.transition = parsed.transition;
  args.next_latents = parsed.per_element("next_latents", next_latents);
  args.log_prob = parsed.per_sample_real("log_prob", tensor_at(outputs, 0));
  args.partials = parsed.workspace(tensor_at(outputs, 1));
  if (!extras.empty()) {
    has_fields(parsed.check, "extras", extras, 7);
    args.mean = parsed.optional_per_element("mean", tensor_at(extras, 0), parsed.real);
    args.reference = reference_of(parsed, tensor_at(extras, 1), tensor_at(extras, 2));
    if (args.reference.velocity.data) {
      args.drift = parsed.per_sample_real("drift", tensor_at(extras, 3));
      args.drift_partials = parsed.workspace(tensor_at(extras, 4));
    }
    args.map = position_map(parsed, "log_prob_map", tensor_at(extras, 5), extras[6].cast<int>());
  }
  run(parsed.latents, args, num_threads, cpu::flow_log_prob, FLOWGRPO_ON_CUDA(flow_log_prob));
}

// gradients = (grad_log_prob or None, grad_velocity or None, grad_negative or None), the last two out; extras = () or
// (grad_mean or None, reference_velocity or None, reference_negative or None, grad_drift or None,
// grad_map or None, map_axis)
void flow_log_prob_backward(const py::tuple& fields, const Tensor& next_latents, const py::tuple& gradients,
                            const py::tuple& extras, int num_threads) {
  const TransitionParser parsed("flow_log_prob_backward", fields);
  has_fields(parsed.check, "gradients", gradients, 3);
  const Tensor grad_log_prob = tensor_at(gradients, 0), grad_velocity = tensor_at(gradients, 1);
  const Tensor grad_negative = tensor_at(gradients, 2);
  const DType dtype = parsed.transition.velocity.dtype;
  FlowLogProbBackwardArgs args{};
  args.transition = parsed.transition;
  args.next_latents = parsed.per_element("next_latents", next_latents);
  if (!grad_log_prob.is_none()) args.grad_log_prob = parsed.per_sample_real("grad_log_prob", grad_log_prob);
  if (!grad_velocity.is_none()) args.grad_velocity = parsed.per_element("grad_velocity", grad_velocity, dtype);
  if (!grad_negative.is_none()) args.grad_negative = parsed.per_element("grad_negative", grad_negative, dtype);
  if (!extras.empty()) {
    has_fields(parsed.check, "extras", extras, 6);
    const Tensor grad_drift = tensor_at(extras, 3);
    args.grad_mean = parsed.optional_per_element("grad_mean", tensor_at(extras, 0), parsed.real);
    args.reference = reference_of(parsed, tensor_at(extras, 1), tensor_at(extras, 2));
    if (!grad_drift.is_none() && args.reference.velocity.data) {
      args.grad_drift = parsed.per_sample_real("grad_drift", grad_drift);
    }
    args.grad_map = position_map(parsed, "grad_map", tensor_at(extras, 4), extras[5].cast<int>());
  }
  run(parsed.latents, args, num_threads, cpu::flow_log_prob_backward, FLOWGRPO_ON_CUDA(flow_log_prob_backward));
}

// Fills out [batch, ...] with normals, or with 32-bit words where it is int64.
void philox(const Tensor& seed, const py::object& step, int64_t stream, const Tensor& out, int num_threads) {
  const Checker check("philox");
  check.dense("seed", seed);
  check.int64("seed", seed);
  if (seed.ndim() != 1) check.fail("seed", "has " + std::to_string(seed.ndim()) + " dimension(s)", "be [batch]");
  check.dense("out", out);
  check.same_device("out", out, "seed", seed);
  PhiloxArgs args{};
  args.seed = seed.data<int64_t>();
  args.stream = stream;
  args.batch = seed.size(0);
  args.elements = out.numel() / args.batch;
  const auto in_a_word = [&check](const char* argument, int64_t value) {
    if (value < 0 || value > 0xffffffffLL) check.fail(argument, "is " + std::to_string(value), "be in [0, 2^32)");
  };
  in_a_word("stream", stream);
  const Tensor index(step.ptr());
  if (index.is_tensor()) {
    check.dense("step", index);
    check.int64("step", index);
    if (index.ndim() != 0) check.shape("step", index, {args.batch});
    check.same_device("step", index, "seed", seed);
    args.step_index = index.data<int64_t>();
    args.step_stride = index.ndim() == 0 ? 0 : 1;
    const bool on_host = index.device().type == dlpack::kCpu;
    for (int64_t i = 0; on_host && i < index.numel(); ++i) in_a_word("step", args.step_index[i]);
  } else {
    args.step = step.cast<int64_t>();
    in_a_word("step", args.step);
  }
  if (out.is_int64()) {
    args.words = out.data<int64_t>();
  } else {
    args.normal = {out.data<void>(), check.floating("out", out)};
  }
  run(seed, args, num_threads, cpu::philox, FLOWGRPO_ON_CUDA(philox));
}

// One Philox block, for the known answers.
std::array<uint32_t, 4> philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const PhiloxWords words = philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, {key[0], key[1]});
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

// The pair of normals two words give, for accuracy tests.
std::array<float, 2> normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const NormalPair pair = box_muller(radius_word, angle_word);
  return {pair.first, pair.second};
}

}  // namespace

inline void bind_flow(py::module_& module) {
  module.def("flow_step", &flow_step);
  module.def("flow_log_prob", &flow_log_prob);
  module.def("flow_log_prob_backward", &flow_log_prob_backward);
  module.def("philox", &philox);
  module.def("philox4x32", &philox4x32);
  module.def("normal_pair", &normal_pair);
}

}  // namespace flowgrpo_fast
