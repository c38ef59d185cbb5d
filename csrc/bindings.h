// What the families of ops in the Python module share: borrowing arguments, and running an op where its tensors are.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cuda_device.h"
#include "tensor.h"

namespace flowgrpo_fast {

namespace py = pybind11;

inline Tensor tensor_at(const py::tuple& fields, size_t index) {
  if (index >= fields.size()) {
    throw py::value_error("a tuple of arguments has " + std::to_string(fields.size()) +
                          " item(s), must have at least " + std::to_string(index + 1));
  }
  return Tensor(PyTuple_GET_ITEM(fields.ptr(), index));
}

// A tuple of the arguments or the results of a kernel has so many fields.
inline void has_fields(const Checker& check, const char* argument, const py::tuple& fields, size_t size) {
  if (fields.size() != size) {
    check.fail(argument, "has " + std::to_string(fields.size()) + " field(s)", "have " + std::to_string(size));
  }
}

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
