// A pool of threads that share numbered tasks. Which thread takes a task never changes what the task computes.
//
// Idle threads sleep. After a fork the child makes a new pool. Every thread works with gradual underflow and
// rounding to nearest, whatever the caller had set.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
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

  void run(int64_t tasks, const std::function<void(int64_t)>& task) {
    if (tasks <= 1 || workers_.empty()) {
      for (int64_t i = 0; i < tasks; ++i) task(i);
      return;
    }
    auto job = std::make_shared<Job>();
    job->task = &task, job->tasks = tasks;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      ++generation_;
    }
    generation_seen_.store(generation_, std::memory_order_release);
    wake_.notify_all();
    take(*job);
    for (int spin = 0; job->done.load(std::memory_order_acquire) < tasks; ++spin)
      if (spin > 4096) std::this_thread::yield();
  }

 private:
  struct Job {
    const std::function<void(int64_t)>* task;
    int64_t tasks;
    std::atomic<int64_t> next{0}, done{0};
  };

  static void take(Job& job) {
    for (int64_t i; (i = job.next.fetch_add(1)) < job.tasks;) {
      (*job.task)(i);
      job.done.fetch_add(1, std::memory_order_release);
    }
  }

  void work() {
    CanonicalMode mode;
    uint64_t seen = 0;
    for (;;) {
      // A short look-out first: the next operator of a forward pass comes within microseconds.
      for (int spin = 0; spin < 20000 && generation_seen_.load(std::memory_order_acquire) == seen; ++spin) {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return closing_ || generation_ != seen; });
        if (closing_) return;
        seen = generation_;
        job = job_;
      }
      take(*job);
    }
  }

  pid_t owner_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  uint64_t generation_ = 0;
  std::atomic<uint64_t> generation_seen_{0};
  bool closing_ = false;
};

}  // namespace gnomon
