// How fast one-row products read weights that lie in no cache, in GB/s: the best tenth, the best quarter, the median.
//
// g++ -O3 -std=c++17 -ffp-contract=off -fno-math-errno -fno-trapping-math -march=x86-64-v4 -mprefer-vector-width=512 \
//   -mavx512vnni -Icsrc benchmarks/products.cpp -o products -pthread && ./products 1
// Compile it against the csrc/ of two commits and run them in turn to compare.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "linear.h"

using namespace gnomon;

int main(int, char** arguments) {
  Pool pool(std::atoi(arguments[1]));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const size_t total = size_t(160) << 20;  // several times the largest cache
  char* memory = static_cast<char*>(std::aligned_alloc(4096, total));
  std::memset(memory, 1, total);
  const int shapes[2][2] = {{576, 1536}, {1536, 576}};
  for (int64_t kind : {0, 1, 2, 4})
    for (auto& shape : shapes) {
      const int64_t K = shape[0], N = shape[1];
      size_t bytes = size_t(N * K) * (kind == 0 ? 4 : 2);
      if (kind > 1) with_kind(kind, [&](auto k) { bytes = size_t(N / 16 * (K / decltype(k)::K) * decltype(k)::RECORD); });
      std::vector<float> x(static_cast<size_t>(K)), y(static_cast<size_t>(N));
      for (float& value : x) value = normal(random);
      std::vector<double> rates;
      size_t at = 0;
      for (int i = 0; i < 600; ++i, at += bytes) {
        if (at + bytes > total) at = 0;
        Weight weight{memory + at, nullptr, N, K, kind};
        auto start = std::chrono::steady_clock::now();
        linear(pool, x.data(), &weight, 1, y.data(), N, 1);
        std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        rates.push_back(double(bytes) / seconds.count() * 1e-9);
      }
      std::sort(rates.rbegin(), rates.rend());
      std::printf("kind %d, K %d: %.1f %.1f %.1f\n", int(kind), int(K), rates[60], rates[150], rates[300]);
    }
}
