// A pool of threads that share numbered tasks. Which thread takes a task never changes what the task computes.
//
// Idle threads sleep. After a fork the child makes a new pool. Every thread works with gradual underflow and
// rounding to nearest, whatever the caller had set.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gnomon {

// Canonical floating-point mode for a scope.
struct CanonicalMode {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  CanonicalMode() { _mm_setcsr(0x1f80); }
  ~CanonicalMode() { _mm_setcsr(saved); }
#endif
};

class Pool {
 public:
  explicit Pool(int threads) : owner_(getpid()) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  bool foreign() const { return owner_ != getpid(); }
  int threads() const { return int(workers_.size()) + 1; }

  // Tasks 0..tasks-1, all done on return. A caller that finds the pool at work for another does its tasks alone.
  void run(int64_t tasks, const std::function<void(int64_t)>& task) {
    std::unique_lock<std::mutex> own(running_, std::defer_lock);
    if (tasks <= 1 || tasks > MOST || workers_.empty() || !own.try_lock()) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    task_ = &task;
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(uint64_t(tasks) << 32);  // published: task_ may be read by whoever draws a number
    if (sleeping_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }  // who is about to sleep has seen the ticket, or is asleep
      wake_.notify_all();
    }
    take();
    for (int spin = 0; done_.load(std::memory_order_acquire) < tasks; ++spin)
      if (spin > 4096) std::this_thread::yield();
  }

 private:
  static constexpr int64_t MOST = 1 << 30;
  static constexpr int LOOKOUT = 20000;

  // The ticket holds a job's count of tasks and the next task in one word. Who draws a number below the count has a task
  // of the current job, which cannot end before that task is done.
  void take() {
    for (;;) {
      uint64_t drawn = ticket_.fetch_add(1);
      int64_t tasks = int64_t(drawn >> 32), i = int64_t(drawn & 0xffffffff);
      if (i >= tasks) return;
      (*task_)(i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  bool anything_left() const {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    return (ticket & 0xffffffff) < ticket >> 32;
  }

  void work() {
    CanonicalMode mode;
    for (;;) {
      // A short look-out first: the next operator of a forward pass comes within microseconds.
      for (int spin = 0; spin < LOOKOUT && !anything_left(); ++spin) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
      if (!anything_left()) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return closing_ || anything_left(); });
        sleeping_.fetch_sub(1);
        if (closing_) return;
      }
      take();
    }
  }

  pid_t owner_;
  std::vector<std::thread> workers_;
  std::mutex mutex_, running_;
  std::condition_variable wake_;
  const std::function<void(int64_t)>* task_ = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleeping_{0};
  bool closing_ = false;
};

// f(first, last) over 0..count in tasks of `size`; or, where memory is what is waited for, one stretch for each thread,
// so that each reads a stream of its own. Tasks begin at multiples of sixteen.
template <typename F>
void for_ranges(Pool& pool, bool stretches, int64_t count, int64_t size, F&& f) {
  if (stretches) size = ((count + pool.threads() - 1) / pool.threads() + 15) / 16 * 16;
  pool.run((count + size - 1) / size, [&](int64_t task) {
    int64_t first = task * size;
    f(first, first + size < count ? first + size : count);
  });
}

}  // namespace gnomon
