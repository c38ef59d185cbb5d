// parallel_for over host threads.
//
// Work items are claimed a few at a time, so results must not depend on who does what. The threads are the OpenMP team
// torch keeps, found at run time: its members spin for milliseconds after each torch op, and a second pool would fight
// them for the cores. Where torch brought no OpenMP, and in the child of a fork (which OpenMP does not survive), a
// persistent pool of our own takes over. It belongs to one caller at a time: a second caller, and a call from inside a
// work item, run on their own thread.
#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flowgrpo_fast {

// Rounds to nearest and keeps subnormals while a work item runs, whatever the calling thread was set to.
class DefaultFloatMode {
 public:
#if defined(__x86_64__)
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatMode() {}
#endif
};

inline void relax_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs body(context) on every thread of a team; the entry point GNU's, LLVM's and Intel's OpenMP libraries share.
using OpenMpParallel = void (*)(void (*body)(void*), void* context, unsigned num_threads, unsigned flags);

// Looked up through the library that uses it: a process may have loaded several OpenMP libraries.
inline OpenMpParallel find_openmp() {
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<OpenMpParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}

class ThreadPool {
 public:
  using Body = void (*)(const void* context, int64_t index);

  // Never destroyed: its threads sleep until the process ends. A forked child starts with a new one.
  static ThreadPool& instance() {
    ThreadPool* pool = current().load();
    while (!pool) {
      ThreadPool* fresh = new ThreadPool;
      if (current().compare_exchange_strong(pool, fresh)) return *fresh;
      delete fresh;
    }
    return *pool;
  }

  // To be called once, before any fork.
  static bool watch_forks() {
    const auto in_child = [] {
      current().store(nullptr);
      forked().store(true);
    };
    return pthread_atfork(nullptr, nullptr, in_child) == 0;
  }

  static void run(int64_t count, int num_threads, Body body, const void* context) {
    static const OpenMpParallel openmp = find_openmp();
    const int helpers = static_cast<int>(count < num_threads ? count : num_threads) - 1;
    Job job{body, context, count, count, helpers, 0, {0}};
    if (helpers <= 0) {
      work(job);
    } else if (openmp && !forked() && !crowded()) {
      // One run of neighbours a thread: long streams through memory; a team without a core stalls either way.
      job.grain = (count + num_threads - 1) / num_threads;
      run_openmp(openmp, &job, num_threads);
    } else {
      // Short runs: whoever has a core does the work.
      job.grain = std::max<int64_t>(1, count / (kClaimsPerThread * num_threads));
      instance().share(&job);
    }
  }

 private:
  struct Job {
    Body body;
    const void* context;
    int64_t count;
    int64_t grain;                           // neighbouring items claimed at once
    int open;                                // helpers that may still join, under mutex_
    int active;                              // helpers at work, under mutex_
    alignas(128) std::atomic<int64_t> next;  // on a cache line of its own
  };

  static constexpr int kSpins = 2000;
  static constexpr int kTurnsAfterStall = 50;
  static constexpr int kMaxThreads = 256;
  static constexpr int64_t kClaimsPerThread = 8;

  static std::atomic<bool>& forked() {
    static std::atomic<bool> is_child{false};
    return is_child;
  }

  static std::atomic<ThreadPool*>& current() {
    static std::atomic<ThreadPool*> pool{nullptr};
    return pool;
  }

  static void work(Job& job) {
    DefaultFloatMode mode;
    for (;;) {
      const int64_t first = job.next.fetch_add(job.grain, std::memory_order_relaxed);
      if (first >= job.count) return;
      const int64_t last = std::min(first + job.grain, job.count);
      for (int64_t index = first; index < last; ++index) job.body(job.context, index);
    }
  }

  // OpenMP ends with a barrier of the whole team, so one member without a core stalls the caller for scheduler ticks.
  // After such a stall the next calls use the own pool, which waits for nobody who has not started.
  static void run_openmp(OpenMpParallel openmp, Job* job, int num_threads) {
    using Clock = std::chrono::steady_clock;
    static thread_local Clock::time_point finished;
    const Clock::time_point start = Clock::now();
    // Always the whole team: changing its size makes OpenMP start and end threads.
    const auto body = [](void* shared) {
      work(*static_cast<Job*>(shared));
      finished = Clock::now();
    };
    openmp(body, job, static_cast<unsigned>(num_threads), 0);
    const auto waited = Clock::now() - finished;
    if (waited > std::chrono::milliseconds(1) && waited > finished - start) own_turns() = kTurnsAfterStall;
  }

  static bool crowded() { return own_turns() > 0 && own_turns()-- > 0; }

  static std::atomic<int>& own_turns() {
    static std::atomic<int> turns{0};
    return turns;
  }

  void share(Job* job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (turn.owns_lock()) publish(job, job->open);
    work(*job);
    if (turn.owns_lock()) retire(job);
  }

  void publish(Job* job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; num_threads_ < helpers && num_threads_ < kMaxThreads; ++num_threads_) {
        std::thread([this] { serve(); }).detach();
      }
      job_ = job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

  void retire(Job* job) {
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [job] { return job->active == 0; });
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) relax_cpu();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      Job* job = job_;
      if (!job || job->open == 0) continue;
      --job->open;
      ++job->active;
      lock.unlock();
      work(*job);
      lock.lock();
      if (--job->active == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller the pool works for
  std::mutex mutex_;  // guards job_, num_threads_ and the counts of a job
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  Job* job_ = nullptr;
  int num_threads_ = 0;
};

// Calls body(index) for every index in [0, count), on at most `num_threads` threads including the caller's.
template <typename Function>
void parallel_for(int64_t count, int num_threads, const Function& body) {
  ThreadPool::run(
      count, num_threads, [](const void* context, int64_t index) { (*static_cast<const Function*>(context))(index); },
      &body);
}

}  // namespace flowgrpo_fast
