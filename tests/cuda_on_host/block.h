// Runs the threads of a CUDA block as fibers of one host thread.
//
// A thread runs until it waits, then the next one that can go on does; the last to arrive at a barrier opens it. Blocks
// run one after another. All lanes of a warp take part in every warp operation. A barrier that some thread never
// reaches ends the launch with std::runtime_error.
//
// To ThreadSanitizer every fiber is a thread. __syncthreads and __syncwarp order memory; shuffles and votes, as in
// CUDA, do not.
#pragma once

#include <stdint.h>
#include <string.h>

namespace cuda_on_host {

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

void wait_block();
void wait_warp(unsigned mask);
unsigned ballot(unsigned mask, bool predicate);

// What `lane` of the warp passed, or one's own bits where there is no such lane.
uint64_t exchange(unsigned mask, uint64_t bits, int lane);

template <typename T>
T shuffle(unsigned mask, T value, int lane) {
  static_assert(sizeof value <= sizeof(uint64_t), "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, lane);
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Grid {
  const char* name;
  const void* kernel;
  unsigned num_blocks, num_threads;
  void (*body)(const void* context);
  const void* context;
};

void run(const Grid& grid);

// Whether a launch was refused since the last call.
bool take_failure();

template <typename... Parameters>
struct Launch {
  const char* name;
  void (*kernel)(Parameters...);
  unsigned num_blocks, num_threads;

  void operator()(const Parameters&... arguments) const {
    const auto call = [&] { kernel(arguments...); };
    const auto body = [](const void* context) { (*static_cast<decltype(call)*>(context))(); };
    run({name, reinterpret_cast<const void*>(kernel), num_blocks, num_threads, body, &call});
  }
};

template <typename... Parameters>
Launch<Parameters...> launch_of(const char* name, void (*kernel)(Parameters...), unsigned num_blocks,
                                unsigned num_threads, void*) {
  return {name, kernel, num_blocks, num_threads};
}

}  // namespace cuda_on_host
