// The preview of running samples.
#pragma once

#include <array>
#include <utility>

#include "bind_transition.h"
#include "preview.h"

namespace flowgrpo_fast {
namespace {

// shape = (planes, time, height, width, inner); pool = (time, height, width)
void preview(const py::tuple& fields, const std::array<int64_t, 5>& shape, const std::array<int64_t, 3>& pool,
             const Tensor& pooled, int num_threads) {
  const TransitionParser parsed("preview", fields);
  PreviewArgs args{};
  args.transition = parsed.transition;
  const auto [planes, time, height, width, inner] = shape;
  const auto [pool_time, pool_height, pool_width] = pool;
  int64_t left = parsed.transition.elements;  // divided, since a product of sides could overflow
  bool divides = true;
  for (const int64_t side : shape) {
    divides = divides && side > 0 && left % side == 0;
    if (divides) left /= side;
  }
  for (size_t axis = 0; axis < pool.size(); ++axis)
    divides = divides && pool[axis] > 0 && shape[axis + 1] % pool[axis] == 0;
  if (!divides || left != 1) {
    parsed.check.fail("grid", "is " + shape_text(&shape[1], 3) + " with cells of " + shape_text(pool.data(), 3),
                      "be made of whole cells and of all positions of latents");
  }
  args.planes = planes, args.time = time, args.height = height, args.width = width, args.inner = inner;
  args.pool_time = pool_time, args.pool_height = pool_height, args.pool_width = pool_width;
  args.pooled = parsed.real_array(
      "pooled", pooled, args.transition.elements / (pool_time * pool_height * pool_width) * args.transition.batch);
  run(parsed.latents, args, num_threads, cpu::preview, FLOWGRPO_ON_CUDA(preview));
}

// pooled [groups * group_size, ...], a workspace like it, gram [groups, group_size, group_size]
void gram(const Tensor& pooled, const Tensor& centred, const Tensor& out, int num_threads) {
  const Checker check("preview");
  check.dense("pooled", pooled);
  check.dense("gram", out);
  if (out.ndim() != 3) check.fail("gram", "has " + std::to_string(out.ndim()) + " dimension(s)", "have 3");
  GramArgs args{};
  args.groups = out.size(0);
  args.group_size = out.size(1);
  check.shape("gram", out, {args.groups, args.group_size, args.group_size});
  if (args.groups * args.group_size != pooled.size(0)) {
    check.fail("group_size", "is " + std::to_string(args.group_size),
               "divide the batch of " + std::to_string(pooled.size(0)));
  }
  args.features = pooled.numel() / pooled.size(0);
  args.pooled = {pooled.data<void>(), check.floating("pooled", pooled)};
  if (size_of(args.pooled.dtype) < 4) check.dtype("pooled", pooled, DType::kFloat32);
  check.dense("workspace", centred);
  check.same_shape("workspace", centred, "pooled", pooled);
  for (const auto& [name, tensor] : {std::pair("workspace", &centred), std::pair("gram", &out)}) {
    check.dtype(name, *tensor, args.pooled.dtype);
    check.same_device(name, *tensor, "pooled", pooled);
  }
  args.centred = centred.data<void>();
  args.gram = out.data<void>();
  run(pooled, args, num_threads, cpu::gram, FLOWGRPO_ON_CUDA(gram));
}

}  // namespace

inline void bind_preview(py::module_& module) {
  module.def("preview", &preview);
  module.def("gram", &gram);
}

}  // namespace flowgrpo_fast
