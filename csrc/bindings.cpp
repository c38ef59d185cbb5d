// The Python module `_C`: every op once, a file bind_*.h a family. A call checks its arguments, borrows the tensors,
// and runs on their device.
//
// The families are one translation unit because pybind11 itself is most of what there is to compile: six of them took
// five times as long.
#include "bindings.h"

#include "bind_flow.h"
#include "bind_group.h"
#include "bind_matching.h"
#include "bind_preview.h"
#include "bind_quantize.h"
#include "cpu_dispatch.h"

namespace flowgrpo_fast {
namespace {

py::dict build_info() {
  py::dict info;
  py::list isas;
  for (const char* const* isa = cpu::compiled_isas(); *isa; ++isa) isas.append(*isa);
  info["version"] = FLOWGRPO_VERSION;
  info["compiler"] = FLOWGRPO_COMPILER;
  info["cuda_archs"] = py::str(FLOWGRPO_CUDA_ARCHS).attr("split")();
  info["nvcc"] = FLOWGRPO_NVCC;
  info["isas"] = isas;
  info["isa"] = cpu::compiled_isas()[cpu::chosen_isa()];
  info["dlpack"] = "1.x C exchange API";
  info["chunk"] = kChunk;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of flowgrpo_fast; flowgrpo_fast.ops is their public face.";
  cpu::chosen_isa();  // a bad FLOWGRPO_FAST_ISA is an ImportError that says so
  module.def("build_info", &build_info);
  bind_flow(module);
  bind_preview(module);
  bind_group(module);
  bind_quantize(module);
  bind_matching(module);
}

}  // namespace flowgrpo_fast
