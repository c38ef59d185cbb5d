// The ops on a transition: flow_step, flow_log_prob and their noise.
#include <array>

#include "bindings.h"
#include "flow_step.h"

namespace flowgrpo_fast {
namespace {

// Field order of the Python tuple `Transition`.
enum Field { kLatents, kVelocity, kCoeffs, kStep, kStepIndex, kNegative, kScale, kX0Prev, kNumFields };

// Checks the tensors of a transition and fills the kernel's view of them.
class TransitionParser {
 public:
  TransitionParser(const char* op, const py::tuple& fields) : check(op), latents(tensor_at(fields, kLatents)) {
    if (fields.size() != kNumFields) check.fail("transition", "has the wrong number of fields", "have 8");
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

// outputs = (next_latents, log_prob, x0_pred or None, workspace or None)
void flow_step(const py::tuple& fields, const Tensor& seed, const py::tuple& outputs, int num_threads) {
  const TransitionParser parsed("flow_step", fields);
  parsed.per_sample("seed", seed);
  parsed.check.int64("seed", seed);
  FlowStepArgs args{};
  args.transition = parsed.transition;
  args.seed = seed.data<int64_t>();
  args.next_latents = parsed.per_element("next_latents", tensor_at(outputs, 0), parsed.transition.latents.dtype);
  args.log_prob = parsed.per_sample_real("log_prob", tensor_at(outputs, 1));
  args.x0_pred = parsed.optional_per_element("x0_pred", tensor_at(outputs, 2), parsed.real);
  args.partials = parsed.workspace(tensor_at(outputs, 3));
  run(parsed.latents, args, num_threads, cpu::flow_step, FLOWGRPO_ON_CUDA(flow_step));
}

// outputs = (log_prob, mean or None, workspace or None)
void flow_log_prob(const py::tuple& fields, const Tensor& next_latents, const py::tuple& outputs, int num_threads) {
  const TransitionParser parsed("flow_log_prob", fields);
  FlowLogProbArgs args{};
  args.transition = parsed.transition;
  args.next_latents = parsed.per_element("next_latents", next_latents);
  args.log_prob = parsed.per_sample_real("log_prob", tensor_at(outputs, 0));
  args.mean = parsed.optional_per_element("mean", tensor_at(outputs, 1), parsed.real);
  args.partials = parsed.workspace(tensor_at(outputs, 2));
  run(parsed.latents, args, num_threads, cpu::flow_log_prob, FLOWGRPO_ON_CUDA(flow_log_prob));
}

// gradients = (grad_log_prob or None, grad_mean or None, grad_velocity or None, grad_negative or None); the last two
// are out
void flow_log_prob_backward(const py::tuple& fields, const Tensor& next_latents, const py::tuple& gradients,
                            int num_threads) {
  const TransitionParser parsed("flow_log_prob_backward", fields);
  const Tensor grad_log_prob = tensor_at(gradients, 0), grad_velocity = tensor_at(gradients, 2);
  const Tensor grad_negative = tensor_at(gradients, 3);
  const DType dtype = parsed.transition.velocity.dtype;
  FlowLogProbBackwardArgs args{};
  args.transition = parsed.transition;
  args.next_latents = parsed.per_element("next_latents", next_latents);
  if (!grad_log_prob.is_none()) args.grad_log_prob = parsed.per_sample_real("grad_log_prob", grad_log_prob);
  args.grad_mean = parsed.optional_per_element("grad_mean", tensor_at(gradients, 1), parsed.real);
  if (!grad_velocity.is_none()) args.grad_velocity = parsed.per_element("grad_velocity", grad_velocity, dtype);
  if (!grad_negative.is_none()) args.grad_negative = parsed.per_element("grad_negative", grad_negative, dtype);
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
  if (stream < 0 || stream > 0xffffffffLL) check.fail("stream", "is " + std::to_string(stream), "be in [0, 2^32)");
  PhiloxArgs args{};
  args.seed = seed.data<int64_t>();
  args.stream = stream;
  args.batch = seed.size(0);
  args.elements = out.numel() / args.batch;
  const Tensor index(step.ptr());
  if (index.is_tensor()) {
    check.dense("step", index);
    check.int64("step", index);
    if (index.ndim() != 0) check.shape("step", index, {args.batch});
    check.same_device("step", index, "seed", seed);
    args.step_index = index.data<int64_t>();
    args.step_stride = index.ndim() == 0 ? 0 : 1;
  } else {
    args.step = step.cast<int64_t>();
    if (args.step < 0 || args.step > 0xffffffffLL)
      check.fail("step", "is " + std::string(py::str(step)), "be in [0, 2^32)");
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

void bind_flow(py::module_& module) {
  module.def("flow_step", &flow_step);
  module.def("flow_log_prob", &flow_log_prob);
  module.def("flow_log_prob_backward", &flow_log_prob_backward);
  module.def("philox", &philox);
  module.def("philox4x32", &philox4x32);
  module.def("normal_pair", &normal_pair);
}

}  // namespace flowgrpo_fast
