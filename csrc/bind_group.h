// The ops on groups: advantages, selections, Pareto fronts and compaction.
#pragma once

#include "bindings.h"
#include "group.h"

namespace flowgrpo_fast {
namespace {

// Rewards or objectives.
Buffer values_of(const Checker& check, const char* argument, const Tensor& tensor) {
  check.dense(argument, tensor);
  const DType dtype = check.floating(argument, tensor);
  const int32_t type = tensor.device().type;
  if (type != dlpack::kCpu && type != dlpack::kCuda) {
    check.fail(argument, "is on " + attribute_text(tensor, "device"), "be on a CPU or a CUDA device");
  }
  return {tensor.data<void>(), dtype};
}

// An int64 array the op writes.
int64_t* integers_of(const Checker& check, const char* argument, const Tensor& tensor,
                     std::initializer_list<int64_t> shape, const char* other_name, const Tensor& other) {
  check.dense(argument, tensor);
  check.int64(argument, tensor);
  check.shape(argument, tensor, shape);
  check.same_device(argument, tensor, other_name, other);
  return tensor.data<int64_t>();
}

int bounded(const Checker& check, const char* argument, const char* what, int64_t number, int64_t most) {
  if (number > most) {
    check.fail(argument, "has " + std::to_string(number) + " " + what, "have at most " + std::to_string(most));
  }
  return static_cast<int>(number);
}

// Every value of an int64 tensor that the host can read.
void in_range(const Checker& check, const char* argument, const Tensor& tensor, int64_t size, const char* of_what) {
  if (tensor.device().type != dlpack::kCpu) return;
  const int64_t *values = tensor.data<int64_t>(), count = tensor.numel();
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= size) {
      check.fail(argument, "is " + std::to_string(values[i]) + " at " + std::to_string(i),
                 "be in [0, " + std::to_string(size) + ") for " + of_what);
    }
  }
}

void index_vector(const Checker& check, const char* argument, const Tensor& tensor, const char* other_name,
                  const Tensor& other) {
  check.dense(argument, tensor);
  check.int64(argument, tensor);
  if (tensor.ndim() != 1) check.shape(argument, tensor, {tensor.numel()});
  check.same_device(argument, tensor, other_name, other);
}

// options = (num_groups, weights or None, aggregate, batch_scale, eps, clip, soft_clip)
void parse_options(const Checker& check, const py::tuple& options, GroupAdvantagesArgs* args) {
  has_fields(check, "options", options, 7);
  args->num_groups = options[0].cast<int64_t>();
  if (args->num_groups < 1) check.fail("num_groups", "is " + std::to_string(args->num_groups), "be at least 1");
  const int64_t most = args->batch > kMaxGroups ? args->batch : kMaxGroups;
  if (args->num_groups > most) {
    check.fail("num_groups", "is " + std::to_string(args->num_groups), "be at most " + std::to_string(most));
  }
  for (double& weight : args->weights) weight = 1.0;
  if (!options[1].is_none()) {
    const py::sequence weights = options[1];
    if (static_cast<int>(weights.size()) != args->num_rewards) {
      check.fail("weights", "has " + std::to_string(weights.size()) + " value(s)",
                 "have " + std::to_string(args->num_rewards) + ", one a reward");
    }
    for (int i = 0; i < args->num_rewards; ++i) args->weights[i] = weights[i].cast<double>();
  }
  const int aggregate = options[2].cast<int>();
  if (aggregate < 0 || aggregate > static_cast<int>(Aggregate::kSeparate)) {
    check.fail("aggregate", "is " + std::to_string(aggregate), "be in [0, 3]");
  }
  args->aggregate = static_cast<Aggregate>(aggregate);
  args->batch_scale = options[3].cast<bool>();
  args->eps = options[4].cast<double>();
  if (!(args->eps >= 0)) check.fail("eps", "is " + std::string(py::str(options[4])), "be at least 0");
  args->clip = options[5].cast<double>();
  args->soft_clip = options[6].cast<double>();
}

void parse_workspaces(const Checker& check, const Tensor& rewards, const py::tuple& workspaces,
                      GroupAdvantagesArgs* args) {
  const Tensor members = tensor_at(workspaces, 0), sums = tensor_at(workspaces, 1);
  args->members = integers_of(check, "members", members, {args->batch}, "rewards", rewards);
  check.dense("sums", sums);
  check.dtype("sums", sums, DType::kFloat64);
  check.shape("sums", sums, {kMaxRewards + args->batch});
  check.same_device("sums", sums, "rewards", rewards);
  args->batch_std = sums.data<double>();
  args->combined = args->batch_std + kMaxRewards;
}

// workspaces = (members, sums) on a GPU, (None, None) on the CPU
void group_advantages(const Tensor& rewards, const Tensor& group_id, const py::tuple& options, const Tensor& advantages,
                      const py::tuple& workspaces, int num_threads) {
  const Checker check("group_advantages");
  GroupAdvantagesArgs args{};
  args.rewards = values_of(check, "rewards", rewards);
  if (rewards.ndim() != 1 && rewards.ndim() != 2) {
    check.fail("rewards", "has " + std::to_string(rewards.ndim()) + " dimension(s)", "be [batch] or [batch, rewards]");
  }
  args.batch = rewards.size(0);
  args.num_rewards = rewards.ndim() == 1 ? 1 : bounded(check, "rewards", "columns", rewards.size(1), kMaxRewards);
  index_vector(check, "group_id", group_id, "rewards", rewards);
  check.shape("group_id", group_id, {args.batch});
  args.group_id = group_id.data<int64_t>();
  parse_options(check, options, &args);
  has_fields(check, "workspaces", workspaces, 2);
  in_range(check, "group_id", group_id, args.num_groups, "that many groups");
  check.dense("advantages", advantages);
  const DType real = args.rewards.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check.dtype("advantages", advantages, real);
  check.same_device("advantages", advantages, "rewards", rewards);
  if (args.aggregate == Aggregate::kSeparate) {
    check.same_shape("advantages", advantages, "rewards", rewards);
  } else {
    check.shape("advantages", advantages, {args.batch});
  }
  args.advantages = {advantages.data<void>(), real};
  if (rewards.device().type == dlpack::kCuda) parse_workspaces(check, rewards, workspaces, &args);
  run(rewards, args, num_threads, cpu::group_advantages, FLOWGRPO_ON_CUDA(group_advantages));
}

SelectArgs parse_candidates(const Checker& check, const Tensor& rewards) {
  SelectArgs args{};
  args.rewards = values_of(check, "rewards", rewards);
  if (rewards.ndim() != 2) {
    check.fail("rewards", "has " + std::to_string(rewards.ndim()) + " dimension(s)", "be [prompts, candidates]");
  }
  args.prompts = rewards.size(0);
  args.candidates = bounded(check, "rewards", "candidates a prompt", rewards.size(1), kMaxCandidates);
  return args;
}

// A number of samples to take, in [least, candidates].
int part_of(const Checker& check, const char* argument, int64_t number, int64_t least, int candidates) {
  if (number < least || number > candidates) {
    check.fail(argument, "is " + std::to_string(number),
               "be in [" + std::to_string(least) + ", " + std::to_string(candidates) + "] for that many candidates");
  }
  return static_cast<int>(number);
}

void best_variance_subset(const Tensor& rewards, int64_t size, const Tensor& indices, int num_threads) {
  const Checker check("best_variance_subset");
  SelectArgs args = parse_candidates(check, rewards);
  args.num_top = part_of(check, "k", size, 1, args.candidates);
  args.best_variance = true;
  args.indices = integers_of(check, "indices", indices, {args.prompts, args.num_top}, "rewards", rewards);
  run(rewards, args, num_threads, cpu::select_samples, FLOWGRPO_ON_CUDA(select_samples));
}

void top_bottom(const Tensor& rewards, int64_t num_top, int64_t num_bottom, const Tensor& indices, int num_threads) {
  const Checker check("top_bottom");
  SelectArgs args = parse_candidates(check, rewards);
  args.num_top = part_of(check, "num_top", num_top, 0, args.candidates);
  args.num_bottom = part_of(check, "num_bottom", num_bottom, 0, args.candidates);
  const int taken = part_of(check, "num_top + num_bottom", num_top + num_bottom, 1, args.candidates);
  args.indices = integers_of(check, "indices", indices, {args.prompts, taken}, "rewards", rewards);
  run(rewards, args, num_threads, cpu::select_samples, FLOWGRPO_ON_CUDA(select_samples));
}

void pareto_fronts(const Tensor& objectives, const Tensor& fronts, int num_threads) {
  const Checker check("pareto_fronts");
  ParetoFrontsArgs args{};
  args.objectives = values_of(check, "objectives", objectives);
  if (objectives.ndim() != 3) {
    check.fail("objectives", "has " + std::to_string(objectives.ndim()) + " dimension(s)",
               "be [prompts, candidates, objectives]");
  }
  args.prompts = objectives.size(0);
  args.candidates = bounded(check, "objectives", "candidates a prompt", objectives.size(1), kMaxFront);
  args.num_objectives = bounded(check, "objectives", "objectives", objectives.size(2), kMaxObjectives);
  args.fronts = integers_of(check, "fronts", fronts, {args.prompts, args.candidates}, "objectives", objectives);
  run(objectives, args, num_threads, cpu::pareto_fronts, FLOWGRPO_ON_CUDA(pareto_fronts));
}

struct Extent {
  const char *first, *last;

  bool overlaps(const Extent& other) const { return first < other.last && other.first < last; }
};

Extent extent_of(const Tensor& tensor) {
  const char* data = tensor.data<char>();
  return {data, data + tensor.numel() * tensor.itemsize()};
}

// What is written must not be what is read, nor be written twice. `read` ends with the indices.
void apart(const Checker& check, const Extent* read, const Extent* written, int num_buffers) {
  for (int i = 0; i < num_buffers; ++i) {
    bool overlaps = written[i].overlaps(read[num_buffers]);
    for (int k = 0; k < num_buffers; ++k) overlaps |= written[i].overlaps(read[k]);
    for (int k = 0; k < i; ++k) overlaps |= written[i].overlaps(written[k]);
    if (overlaps) {
      check.fail(("out[" + std::to_string(i) + "]").c_str(), "shares memory with another argument",
                 "be memory of its own");
    }
  }
}

Rows parse_rows(const Checker& check, const std::string& place, const Tensor& buffer, const Tensor& target,
                const Tensor& indices) {
  const std::string source_name = "buffers" + place, target_name = "out" + place;
  check.dense(source_name.c_str(), buffer);
  check.same_device(source_name.c_str(), buffer, "indices", indices);
  if (buffer.ndim() == 0) check.fail(source_name.c_str(), "has 0 dimensions", "be [rows, ...]");
  check.dense(target_name.c_str(), target);
  check.same_device(target_name.c_str(), target, "indices", indices);
  bool fits = target.ndim() == buffer.ndim() && target.size(0) == indices.size(0) && target.same_dtype(buffer);
  for (int axis = 1; fits && axis < buffer.ndim(); ++axis) fits = target.size(axis) == buffer.size(axis);
  if (!fits) {
    check.fail(target_name.c_str(),
               "has shape " + attribute_text(target, "shape") + " and dtype " + attribute_text(target, "dtype"),
               "have the rows and the dtype of " + source_name + ", one row an index");
  }
  Rows rows{};
  rows.source = buffer.data<char>();
  rows.target = target.data<char>();
  rows.num_rows = buffer.size(0);
  rows.row_bytes = buffer.numel() / rows.num_rows * buffer.itemsize();
  return rows;
}

void compact(const Tensor& indices, const py::tuple& buffers, const py::tuple& out, int num_threads) {
  const Checker check("compact");
  index_vector(check, "indices", indices, "indices", indices);
  if (buffers.size() == 0 || buffers.size() > kMaxBuffers) {
    check.fail("buffers", "has " + std::to_string(buffers.size()) + " tensor(s)",
               "have 1 to " + std::to_string(kMaxBuffers));
  }
  if (out.size() != buffers.size()) {
    check.fail("out", "has " + std::to_string(out.size()) + " tensor(s)",
               "have " + std::to_string(buffers.size()) + ", one a buffer");
  }
  CompactArgs args{};
  args.indices = indices.data<int64_t>();
  args.num_indices = indices.size(0);
  args.num_buffers = static_cast<int>(buffers.size());
  Extent read[kMaxBuffers + 1], written[kMaxBuffers];
  read[args.num_buffers] = extent_of(indices);
  for (int i = 0; i < args.num_buffers; ++i) {
    const std::string place = "[" + std::to_string(i) + "]";
    const Tensor buffer = tensor_at(buffers, static_cast<size_t>(i)), target = tensor_at(out, static_cast<size_t>(i));
    args.rows[i] = parse_rows(check, place, buffer, target, indices);
    in_range(check, "indices", indices, args.rows[i].num_rows, ("the rows of buffers" + place).c_str());
    read[i] = extent_of(buffer);
    written[i] = extent_of(target);
  }
  apart(check, read, written, args.num_buffers);
  run(indices, args, num_threads, cpu::compact, FLOWGRPO_ON_CUDA(compact));
}

}  // namespace

inline void bind_group(py::module_& module) {
  module.def("group_advantages", &group_advantages);
  module.def("best_variance_subset", &best_variance_subset);
  module.def("top_bottom", &top_bottom);
  module.def("pareto_fronts", &pareto_fronts);
  module.def("compact", &compact);
}

}  // namespace flowgrpo_fast
