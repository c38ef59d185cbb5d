// Declares an op once for all the places that define it; used at the end of an op's header, inside the namespace.
#pragma once

#include <stdint.h>

// The op on each device. On the CPU it may use up to num_threads threads. On a GPU it launches on `stream` and returns
// at once: nothing is allocated and nothing waits, so a call can be captured in a CUDA graph; every pointer in the
// arguments is then a device pointer, and workspace is the caller's.
#define FLOWGRPO_DECLARE_OP(op, Args)         \
  namespace cpu {                             \
  void op(const Args& args, int num_threads); \
  }                                           \
  namespace cuda {                            \
  void op(const Args& args, void* stream);    \
  }

// A CPU kernel: its source is compiled once an instruction set, in a namespace of that name. It does one work item,
// usually chunk `index % chunks` of sample `index / chunks`. The drivers pick one copy with FLOWGRPO_PICK.
#define FLOWGRPO_DECLARE_KERNEL(kernel, Args)   \
  namespace baseline {                          \
  void kernel(const Args& args, int64_t index); \
  }                                             \
  namespace avx2 {                              \
  void kernel(const Args& args, int64_t index); \
  }                                             \
  namespace avx512 {                            \
  void kernel(const Args& args, int64_t index); \
  }
