// The residuals of velocity predictions.
#pragma once

#include <optional>

#include "bindings.h"
#include "matching.h"

namespace flowgrpo_fast {
namespace {

// Field order of the Python tuple of what the residuals are made of.
enum Field { kVelocity, kTarget, kOldVelocity, kReferenceVelocity, kWeight, kNumFields };

// Checks the tensors and fills the kernel's view of them.
class ResidualParser {
 public:
  ResidualParser(const char* op, const py::tuple& fields, const std::optional<double>& beta)
      : check(op), velocity(tensor_at(fields, kVelocity)) {
    has_fields(check, "inputs", fields, kNumFields);
    check.dense("velocity", velocity);
    if (velocity.ndim() < 2) {
      check.fail("velocity", "has " + std::to_string(velocity.ndim()) + " dimension(s)", "be [batch, ...]");
    }
    const DType dtype = check.floating("velocity", velocity);
    real = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    residuals.velocity = {velocity.data<void>(), dtype};
    residuals.batch = velocity.size(0);
    residuals.elements = velocity.numel() / residuals.batch;
    residuals.implicit = beta.has_value();
    residuals.beta = beta.value_or(0.0);
    residuals.target = per_element("target", tensor_at(fields, kTarget));
    const Tensor old_velocity = tensor_at(fields, kOldVelocity);
    residuals.old_velocity = beta ? per_element("old_velocity", old_velocity) : optional("old_velocity", old_velocity);
    residuals.reference_velocity = optional("reference_velocity", tensor_at(fields, kReferenceVelocity));
    const Tensor weight = tensor_at(fields, kWeight);
    if (!weight.is_none()) parse_weight(weight);
  }

  // A tensor of the velocity's shape.
  Buffer per_element(const char* argument, const Tensor& tensor) const {
    check.dense(argument, tensor);
    check.same_shape(argument, tensor, "velocity", velocity);
    check.same_device(argument, tensor, "velocity", velocity);
    const DType dtype = check.floating(argument, tensor);
    if ((dtype == DType::kFloat64) != (real == DType::kFloat64)) {
      check.fail(argument, std::string("has dtype ") + Checker::name_of(dtype),
                 real == DType::kFloat64 ? "have torch.float64 as velocity has"
                                         : "have float32, bfloat16 or float16, or all tensors float64");
    }
    return {tensor.data<void>(), dtype};
  }

  // A tensor of one value a sample in the arithmetic dtype.
  void* per_sample(const char* argument, const Tensor& tensor) const {
    check.dense(argument, tensor);
    check.shape(argument, tensor, {residuals.batch});
    check.dtype(argument, tensor, real);
    check.same_device(argument, tensor, "velocity", velocity);
    return tensor.data<void>();
  }

  void* incoming(const char* argument, const Tensor& tensor) const {
    return tensor.is_none() ? nullptr : per_sample(argument, tensor);
  }

  double* workspace(const Tensor& tensor) const {
    if (velocity.device().type != dlpack::kCuda) return nullptr;
    check.dense("workspace", tensor);
    check.shape("workspace", tensor, {num_means(residuals), residuals.batch, num_chunks(residuals.elements)});
    check.dtype("workspace", tensor, DType::kFloat64);
    check.same_device("workspace", tensor, "velocity", velocity);
    return tensor.data<double>();
  }

  Checker check;
  Tensor velocity;
  Residuals residuals{};
  DType real = DType::kFloat32;

 private:
  Buffer optional(const char* argument, const Tensor& tensor) const {
    return tensor.is_none() ? Buffer{} : per_element(argument, tensor);
  }

  // The first and the last axis along which weights repeat bound the shared ones.
  void parse_weight(const Tensor& weight) {
    check.dense("weight", weight);
    check.dtype("weight", weight, real);
    check.same_device("weight", weight, "velocity", velocity);
    const int ndim = velocity.ndim();
    bool broadcasts = weight.ndim() == ndim;
    int first = ndim, last = ndim - 1;
    for (int axis = 0; broadcasts && axis < ndim; ++axis) {
      const bool repeats = weight.size(axis) == 1 && velocity.size(axis) != 1;
      broadcasts = repeats || weight.size(axis) == velocity.size(axis);
      if (!repeats || axis == 0) continue;
      if (first == ndim) first = axis;
      last = axis;
    }
    for (int axis = first; broadcasts && axis <= last; ++axis) broadcasts = weight.size(axis) == 1;
    if (!broadcasts) {
      check.fail("weight", "has shape " + Checker::shape_of(weight),
                 "have " + Checker::shape_of(velocity) + " with 1 in place of the batch or of neighbouring axes");
    }
    WeightMap& map = residuals.weight;
    map = {weight.data<void>(), 1, 1, weight.size(0) == 1 ? 0 : weight.numel() / weight.size(0)};
    for (int axis = first; axis <= last; ++axis) map.shared *= velocity.size(axis);
    for (int axis = first == ndim ? 1 : last + 1; axis < ndim; ++axis) map.inner *= velocity.size(axis);
  }
};

// inputs = (velocity, target, old_velocity or None, reference_velocity or None, weight or None), a beta where positive
// and negative are asked for; means are out, in the order of matching.h
void matching(const py::tuple& inputs, const std::optional<double>& beta, const py::tuple& means,
              const Tensor& workspace, int num_threads) {
  const ResidualParser parsed(beta ? "implicit_matching" : "matching", inputs, beta);
  MatchingArgs args{};
  args.residuals = parsed.residuals;
  const int count = num_means(parsed.residuals);
  has_fields(parsed.check, "means", means, static_cast<size_t>(count));
  for (int mean = 0; mean < count; ++mean) args.means[mean] = parsed.per_sample("means", tensor_at(means, mean));
  args.partials = parsed.workspace(workspace);
  run(parsed.velocity, args, num_threads, cpu::matching, FLOWGRPO_ON_CUDA(matching));
}

// grads = the gradients of (error, old_drift, positive, negative, reference_drift), each or None
void matching_backward(const py::tuple& inputs, const std::optional<double>& beta, const py::tuple& grads,
                       const Tensor& grad_velocity, int num_threads) {
  const ResidualParser parsed("matching_backward", inputs, beta);
  has_fields(parsed.check, "grads", grads, 5);
  const Residuals& residuals = parsed.residuals;
  MatchingBackwardArgs args{};
  args.residuals = residuals;
  args.grad_error = parsed.incoming("grad_error", tensor_at(grads, 0));
  if (residuals.old_velocity.data) {
    args.grad_old_drift = parsed.incoming("grad_old_drift", tensor_at(grads, 1));
    args.grad_positive = parsed.incoming("grad_positive", tensor_at(grads, 2));
    args.grad_negative = parsed.incoming("grad_negative", tensor_at(grads, 3));
  }
  if (residuals.reference_velocity.data) {
    args.grad_reference_drift = parsed.incoming("grad_reference_drift", tensor_at(grads, 4));
  }
  args.grad_velocity = parsed.per_element("grad_velocity", grad_velocity);
  parsed.check.dtype("grad_velocity", grad_velocity, residuals.velocity.dtype);
  run(parsed.velocity, args, num_threads, cpu::matching_backward, FLOWGRPO_ON_CUDA(matching_backward));
}

// Where the weight of an element is, for tests of places no array of a test reaches.
int64_t weight_place_of(int64_t element, int64_t shared, int64_t inner) {
  const Checker check("weight_place");
  if (inner < 1) check.fail("inner", "is " + std::to_string(inner), "be at least 1");
  const int64_t most = INT64_MAX / inner;
  if (shared < 1 || shared > most) {
    check.fail("shared", "is " + std::to_string(shared), "be in [1, " + std::to_string(most) + "]");
  }
  return weight_place({nullptr, shared, inner, 0}, element);
}

}  // namespace

inline void bind_matching(py::module_& module) {
  module.def("matching", &matching);
  module.def("matching_backward", &matching_backward);
  module.def("weight_place", &weight_place_of);
}

}  // namespace flowgrpo_fast
