// Never instrumented itself: its own bookkeeping is no memory of the kernels. The sanitizer it serves is told of
// switches and barriers through the functions below.
#include "block.h"

#include <sys/mman.h>

#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(CUDA_ON_HOST_ADDRESS)
#include <sanitizer/common_interface_defs.h>
#elif defined(CUDA_ON_HOST_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

// Pushes the registers a call preserves, stores the stack pointer, and takes another's.
extern "C" void cuda_on_host_switch(void** saved, void* next);
asm(R"(
.text
.globl cuda_on_host_switch
.hidden cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, . - cuda_on_host_switch
)");

namespace cuda_on_host {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;

// An address through which one fiber's writes become another's to read.
struct Order {
  char address;

  void publish() {
#ifdef CUDA_ON_HOST_THREAD
    __tsan_release(&address);
#endif
  }
  void see() {
#ifdef CUDA_ON_HOST_THREAD
    __tsan_acquire(&address);
#endif
  }
};

enum class Kind { kBlock, kWarp, kShuffle, kVote };

// Two of everything that outlives the barrier: a thread may be at the next one before another has left this.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  Kind kind = Kind::kBlock;
  Order order[2];
};

struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;  // its thread to TSan, its fake stack to ASan
  const Barrier* waits_at = nullptr;
  unsigned generation = 0;
  bool finished = false;
  uint64_t slot[2] = {};

  bool can_run() const { return !finished && !(waits_at && waits_at->generation == generation); }
};

void fiber_main();

struct Block {
  Fiber host;  // who launched
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned current = 0;
  Fiber* previous = nullptr;
  Barrier block, warps[kMaxThreads / kWarp];
  Order start, finish;
  const Grid* grid = nullptr;
  std::string failure;
  bool refused = false;
  std::set<const void*> launched;

  Fiber& running() { return *fibers[current]; }
};

Block& state() {
  static Block& block = *new Block;
  return block;
}

std::mutex& launching() {
  static std::mutex& mutex = *new std::mutex;
  return mutex;
}

std::unique_ptr<Fiber> new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  if (stack == MAP_FAILED) throw std::runtime_error("cuda_on_host: no memory for stacks");
  fiber->stack = stack;
  fiber->stack_bytes = kStackBytes;
  // Where a first switch returns to, below it the six registers; a function expects 8 modulo 16 on entry.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(fiber_main);
  fiber->stack_pointer = top - 6;
#ifdef CUDA_ON_HOST_THREAD
  fiber->sanitizer = __tsan_create_fiber(0);
#endif
  return fiber;
}

// To be called first thing after a switch.
void arrived_from_switch([[maybe_unused]] Fiber& self) {
#ifdef CUDA_ON_HOST_ADDRESS
  Fiber& from = *state().previous;
  __sanitizer_finish_switch_fiber(self.sanitizer, &from.stack, &from.stack_bytes);
#endif
}

void switch_fibers(Fiber& from, Fiber& to) {
  state().previous = &from;
#if defined(CUDA_ON_HOST_ADDRESS)
  __sanitizer_start_switch_fiber(&from.sanitizer, to.stack, to.stack_bytes);
#elif defined(CUDA_ON_HOST_THREAD)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  cuda_on_host_switch(&from.stack_pointer, to.stack_pointer);
  arrived_from_switch(from);
}

// On to the next thread that can run; to the host where all have finished, or none ever will.
void leave() {
  Block& block = state();
  const unsigned count = blockDim.x, from = block.current;
  bool all_finished = true;
  for (unsigned step = 1; step <= count; ++step) {
    const unsigned next = (from + step) % count;
    all_finished &= block.fibers[next]->finished;
    if (!block.fibers[next]->can_run()) continue;
    if (next != from) {
      block.current = threadIdx.x = next;
      switch_fibers(*block.fibers[from], *block.fibers[next]);
    }
    return;
  }
  if (!all_finished) block.failure = "a barrier is not reached by all threads of a block";
  switch_fibers(*block.fibers[from], block.host);
}

void fiber_main() {
  arrived_from_switch(state().running());
  for (;;) {
    state().start.see();
    state().grid->body(state().grid->context);
    state().finish.publish();
    state().running().finished = true;
    leave();
  }
}

// Ends the launch from inside a kernel.
void fail(const char* why) {
  state().failure = why;
  switch_fibers(state().running(), state().host);
}

// Returns the generation that was waited for.
unsigned wait_at(Barrier& barrier, Kind kind, bool orders) {
  Fiber& self = state().running();
  const unsigned generation = barrier.generation;
  Order& order = barrier.order[generation % 2];
  if (barrier.arrived == 0) barrier.kind = kind;
  if (barrier.kind != kind) fail("lanes of a warp wait at different operations");
  if (orders) order.publish();
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    self.waits_at = &barrier;
    self.generation = generation;
    leave();
    self.waits_at = nullptr;
  }
  if (orders) order.see();
  return generation;
}

unsigned wait_at_warp(unsigned mask, Kind kind) {
  if (mask != 0xffffffffu) fail("a warp operation does not name all 32 lanes");
  return wait_at(state().warps[threadIdx.x / kWarp], kind, kind == Kind::kWarp);
}

void prepare(const Grid& grid) {
  Block& block = state();
  block.grid = &grid;
  block.failure.clear();
  block.launched.insert(grid.kernel);
  while (block.fibers.size() < grid.num_threads) block.fibers.push_back(new_fiber());
  blockDim.x = grid.num_threads;
  gridDim.x = grid.num_blocks;
  block.block.expected = grid.num_threads;
  for (Barrier& warp : block.warps) warp.expected = kWarp;
#ifdef CUDA_ON_HOST_THREAD
  block.host.sanitizer = __tsan_get_current_fiber();
#endif
}

void run_block(unsigned index) {
  Block& block = state();
  blockIdx.x = index;
  for (auto& fiber : block.fibers) {
    fiber->finished = false;
    fiber->waits_at = nullptr;
  }
  block.current = threadIdx.x = 0;
  block.start.publish();
  switch_fibers(block.host, block.running());
  block.finish.see();
}

}  // namespace

void wait_block() { wait_at(state().block, Kind::kBlock, true); }

void wait_warp(unsigned mask) { wait_at_warp(mask, Kind::kWarp); }

uint64_t exchange(unsigned mask, uint64_t bits, int lane) {
  Block& block = state();
  const unsigned self = threadIdx.x, side = block.warps[self / kWarp].generation % 2;
  block.fibers[self]->slot[side] = bits;
  wait_at_warp(mask, Kind::kShuffle);
  if (lane < 0 || lane >= static_cast<int>(kWarp)) return bits;
  return block.fibers[self / kWarp * kWarp + static_cast<unsigned>(lane)]->slot[side];
}

unsigned ballot(unsigned mask, bool predicate) {
  Block& block = state();
  const unsigned self = threadIdx.x, side = block.warps[self / kWarp].generation % 2;
  block.fibers[self]->slot[side] = predicate;
  wait_at_warp(mask, Kind::kVote);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    votes |= static_cast<unsigned>(block.fibers[self / kWarp * kWarp + lane]->slot[side] & 1) << lane;
  }
  return votes;
}

void run(const Grid& grid) {
  const std::lock_guard<std::mutex> lock(launching());
  Block& block = state();
  if (grid.num_blocks == 0 || grid.num_threads == 0 || grid.num_threads > kMaxThreads || grid.num_threads % kWarp) {
    block.refused = true;
    return;
  }
  prepare(grid);
  for (unsigned index = 0; index < grid.num_blocks && block.failure.empty(); ++index) run_block(index);
  if (block.failure.empty()) return;
  for (auto& fiber : block.fibers) fiber.release();  // stopped in the middle of the kernel: left as they are
  block.fibers.clear();
  for (Barrier& warp : block.warps) warp = {};
  block.block = {};
  throw std::runtime_error("cuda_on_host: " + std::string(grid.name) + ": " + block.failure);
}

bool take_failure() {
  const std::lock_guard<std::mutex> lock(launching());
  const bool refused = state().refused;
  state().refused = false;
  return refused;
}

// Addresses of the kernels launched so far; returns how many there are.
extern "C" __attribute__((visibility("default"))) size_t cuda_on_host_launched(const void** out, size_t capacity) {
  const std::lock_guard<std::mutex> lock(launching());
  size_t count = 0;
  for (const void* kernel : state().launched) {
    if (count < capacity) out[count] = kernel;
    ++count;
  }
  return count;
}

}  // namespace cuda_on_host
