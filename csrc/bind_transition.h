// What the bindings of the ops on a transition share: the checks of its tensors.
#pragma once

#include "bindings.h"
#include "flow_step.h"

namespace flowgrpo_fast {

// Field order of the Python tuple `Transition`.
enum Field { kLatents, kVelocity, kCoeffs, kStep, kStepIndex, kNegative, kScale, kX0Prev, kNumFields };

// Checks the tensors of a transition and fills the kernel's view of them.
class TransitionParser {
 public:
  TransitionParser(const char* op, const py::tuple& fields) : check(op), latents(tensor_at(fields, kLatents)) {
    has_fields(check, "transition", fields, kNumFields);
    parse_states(fields);
    parse_coeffs(tensor_at(fields, kCoeffs));
    parse_step(tensor_at(fields, kStepIndex), fields[kStep]);
  }

  // A tensor of one value a sample.
  void per_sample(const char* argument, const Tensor& tensor) const {
    check.dense(argument, tensor);
    check.shape(argument, tensor, {transition.batch});
    check.same_device(argument, tensor, "latents", latents);
  }

  // A tensor of the latents' shape.
  Buffer per_element(const char* argument, const Tensor& tensor) const {
    check.dense(argument, tensor);
    check.same_shape(argument, tensor, "latents", latents);
    check.same_device(argument, tensor, "latents", latents);
    const DType dtype = check.floating(argument, tensor);
    if ((dtype == DType::kFloat64) != (real == DType::kFloat64)) {
      check.fail(argument, std::string("has dtype ") + Checker::name_of(dtype),
                 real == DType::kFloat64 ? "have torch.float64 as latents has"
                                         : "have float32, bfloat16 or float16, or all tensors float64");
    }
    return {tensor.data<void>(), dtype};
  }

  Buffer per_element(const char* argument, const Tensor& tensor, DType wanted) const {
    const Buffer buffer = per_element(argument, tensor);
    check.dtype(argument, tensor, wanted);
    return buffer;
  }

  void* optional_per_element(const char* argument, const Tensor& tensor, DType wanted) const {
    return tensor.is_none() ? nullptr : per_element(argument, tensor, wanted).data;
  }

  void* per_sample_real(const char* argument, const Tensor& tensor) const {
    per_sample(argument, tensor);
    check.dtype(argument, tensor, real);
    return tensor.data<void>();
  }

  // A tensor of `count` values in the arithmetic dtype, whatever its shape.
  void* real_array(const char* argument, const Tensor& tensor, int64_t count) const {
    check.dense(argument, tensor);
    check.dtype(argument, tensor, real);
    check.same_device(argument, tensor, "latents", latents);
    if (tensor.numel() != count) {
      check.fail(argument, "has " + std::to_string(tensor.numel()) + " elements", "have " + std::to_string(count));
    }
    return tensor.data<void>();
  }

  double* workspace(const Tensor& tensor) const {
    if (latents.device().type != dlpack::kCuda) return nullptr;
    check.dense("workspace", tensor);
    check.shape("workspace", tensor, {transition.batch, num_chunks(transition.elements)});
    check.dtype("workspace", tensor, DType::kFloat64);
    check.same_device("workspace", tensor, "latents", latents);
    return tensor.data<double>();
  }

  Checker check;
  Tensor latents;
  Transition transition{};
  DType real = DType::kFloat32;

 private:
  void parse_states(const py::tuple& fields) {
    check.dense("latents", latents);
    if (latents.ndim() < 2)
      check.fail("latents", "has " + std::to_string(latents.ndim()) + " dimension(s)", "be [batch, ...]");
    const auto [type, id] = latents.device();
    if (type != dlpack::kCpu && type != dlpack::kCuda) {
      check.fail("latents", "is on " + attribute_text(latents, "device"), "be on a CPU or a CUDA device");
    }
    const DType dtype = check.floating("latents", latents);
    real = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    transition.batch = latents.size(0);
    transition.elements = latents.numel() / transition.batch;
    transition.latents = {latents.data<void>(), dtype};
    transition.velocity = per_element("velocity", tensor_at(fields, kVelocity));
    const Tensor negative = tensor_at(fields, kNegative);
    if (!negative.is_none()) {
      transition.negative_velocity = per_element("guidance.negative_velocity", negative, transition.velocity.dtype);
      transition.guidance_scale = fields[kScale].cast<double>();
    }
    transition.x0_prev = optional_per_element("x0_prev", tensor_at(fields, kX0Prev), real);
  }

  void parse_coeffs(const Tensor& coeffs) {
    check.dense("coeffs", coeffs);
    if (coeffs.ndim() != 2) check.shape("coeffs", coeffs, {coeffs.size(0), kRowWidth});
    check.shape("coeffs", coeffs, {coeffs.size(0), kRowWidth});
    check.dtype("coeffs", coeffs, DType::kFloat32);
    check.same_device("coeffs", coeffs, "latents", latents);
    transition.coeffs = coeffs.data<float>();
    transition.num_steps = coeffs.size(0);
  }

  void in_table(int64_t step) const {
    if (step < 0 || step >= transition.num_steps) {
      check.fail("step_index", "is " + std::to_string(step),
                 "be in [0, " + std::to_string(transition.num_steps) + ") for coeffs of that many rows");
    }
  }

  void parse_step(const Tensor& index, const py::handle& step) {
    if (index.is_none()) {
      transition.step = step.cast<int64_t>();
      return in_table(transition.step);
    }
    check.dense("step_index", index);
    check.int64("step_index", index);
    if (index.ndim() != 0) check.shape("step_index", index, {transition.batch});
    const bool on_host = index.device().type == dlpack::kCpu;
    if (on_host && index.ndim() == 0) {
      transition.step = *index.data<int64_t>();
      return in_table(transition.step);
    }
    check.same_device("step_index", index, "latents", latents);
    transition.step_index = index.data<int64_t>();
    transition.step_stride = index.ndim() == 0 ? 0 : 1;
    for (int64_t i = 0; on_host && i < transition.batch; ++i) in_table(transition.step_index[i]);
  }
};

}  // namespace flowgrpo_fast
