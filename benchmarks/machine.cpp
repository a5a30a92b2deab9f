// What this machine can do at most: bytes a second that `threads` threads read from memory, in GB/s. See engine.py.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include <sys/mman.h>

int main(int, char** arguments) {
  typedef uint64_t Wide __attribute__((vector_size(64), aligned(64)));
  const size_t bytes = size_t(128) << 20;
  const int threads = std::atoi(arguments[1]);
  std::vector<Wide*> areas;
  for (int i = 0; i < threads; ++i) {
    areas.push_back(static_cast<Wide*>(std::aligned_alloc(size_t(2) << 20, bytes)));
    madvise(areas.back(), bytes, MADV_HUGEPAGE);  // as our weights lie
    std::memset(static_cast<void*>(areas.back()), i, bytes);
  }
  double best = 0;
  for (int round = 0; round < 12; ++round) {
    std::vector<std::thread> readers;
    std::atomic<uint64_t> sink{0};
    auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < threads; ++i)
      readers.emplace_back([&, i] {
        Wide sums[4] = {};
        for (size_t k = 0; k < bytes / 64; k += 4)
          for (int l = 0; l < 4; ++l) sums[l] += areas[size_t(i)][k + size_t(l)];
        sink += sums[0][0] + sums[1][0] + sums[2][0] + sums[3][0];
      });
    for (auto& reader : readers) reader.join();
    double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    double rate = double(bytes) * threads / seconds * 1e-9;
    if (rate > best) best = rate;
  }
  std::printf("%.1f\n", best);
}
