// What the families of ops in the Python module share: borrowing arguments, and running an op where its tensors are.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda_device.h"
#include "tensor.h"

namespace flowgrpo_fast {

namespace py = pybind11;

inline Tensor tensor_at(const py::tuple& fields, size_t index) { return Tensor(PyTuple_GET_ITEM(fields.ptr(), index)); }

// Runs an op where its tensors are, without holding the interpreter.
template <typename Args, typename OnCuda>
inline void run(const Tensor& where, const Args& args, int num_threads, void (*on_cpu)(const Args&, int),
                [[maybe_unused]] OnCuda on_cuda) {
  if (where.device().type == dlpack::kCpu) {
    const py::gil_scoped_release release;
    return on_cpu(args, num_threads);
  }
#ifdef FLOWGRPO_WITH_CUDA
  void* stream = where.current_stream();
  const py::gil_scoped_release release;
  const cuda::DeviceGuard guard(where.device().id);
  on_cuda(args, stream);
#else
  throw py::value_error("flowgrpo_fast was built without CUDA (see build_info()), tensors must be on the CPU");
#endif
}

#ifdef FLOWGRPO_WITH_CUDA
#define FLOWGRPO_ON_CUDA(op) cuda::op
#else
#define FLOWGRPO_ON_CUDA(op) nullptr
#endif

}  // namespace flowgrpo_fast
