// The canonical operators as a plain C interface, compiled once per instruction set.
//
// Every output element is computed in an order that its shape alone fixes; register tiles and threads only choose which
// elements are computed together. Shapes in comments: M, T rows, N outputs, K inputs, D head size, B = 64 keys of a page.
#include <map>

#include "rowwise.h"

namespace gnomon {

// Pools are made once per thread count and never destroyed: another engine of this process may be inside one.
std::mutex pools_mutex;
std::map<int, Pool*> pools;
std::atomic<Pool*> current{nullptr};

void choose_pool(int threads) {
  std::lock_guard<std::mutex> lock(pools_mutex);
  Pool*& pool = pools[threads];
  if (!pool || pool->foreign()) pool = new Pool(threads);  // after a fork the old one's threads are gone
  current.store(pool);
}

Pool& the_pool() {
  Pool* pool = current.load();
  if (!pool || pool->foreign()) choose_pool(pool ? pool->threads() : 1);
  return *current.load();
}

}  // namespace gnomon

using namespace gnomon;

extern "C" {

// Raised whenever a definition in this library changes by a bit.
int gnomon_kernel_version() { return 1; }

const char* gnomon_isa() {
#if defined(__AVX512VNNI__)
  return "v4vnni";
#elif defined(__AVX512F__)
  return "v4";
#elif defined(__AVX2__) && defined(__FMA__)
  return "v3";
#else
  return "generic";
#endif
}

// Whether this processor can run this build; generic code always can.
int gnomon_supported() {
#if defined(__AVX512F__)
  bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(__AVX512VNNI__)
  return v4 && __builtin_cpu_supports("avx512vnni");
#else
  return v4;
#endif
#elif defined(__AVX2__) && defined(__FMA__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

void gnomon_threads(int threads) { choose_pool(threads); }

// x: [M, K]; y: [M, sum of the weights' N], side by side. 0: a weight of an unknown kind.
int gnomon_linear(const float* x, const Weight* weights, int64_t count, float* y, int64_t ldy, int64_t M) {
  CanonicalMode mode;
  return linear(the_pool(), x, weights, count, y, ldy, M);
}

// Bytes of an [N, K] weight in panels; 0 for an unknown kind.
int64_t gnomon_packed_size(int64_t kind, int64_t N, int64_t K) {
  int64_t size = 0;
  with_kind(kind, [&](auto k) {
    using T = decltype(k);
    size = (N + 15) / 16 * ((K + T::K - 1) / T::K) * T::RECORD;
  });
  return size;
}

// q: [N, K] unsigned; scales, minima: [N, groups] float32 or half as the kind has them.
int gnomon_pack(int64_t kind, const uint8_t* q, const void* scales, const void* minima, uint8_t* out, int64_t N, int64_t K) {
  return with_kind(kind, [&](auto k) {
    using T = decltype(k);
    using S = typename T::S;
    pack<T>(q, static_cast<const S*>(scales), static_cast<const S*>(minima), out, N, K);
  });
}

// y: [count, K], the named outputs' weights.
int gnomon_unpack_rows(int64_t kind, const uint8_t* data, const int64_t* rows, int64_t count, float* y, int64_t K) {
  CanonicalMode mode;
  return with_kind(kind, [&](auto k) {
    using T = decltype(k);
    for_rows(the_pool(), count, [&](int64_t i) { unpack_row<T>(data, rows[i], y + i * K, K); });
  });
}

void gnomon_rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t K, float eps) {
  CanonicalMode mode;
  for_rows(the_pool(), rows, [=](int64_t m) { normalise(x + m * K, weight, y + m * K, K, eps); });
}

void gnomon_add_rms_norm(const float* x, const float* residual, const float* weight, float* y, float* total,
                         int64_t rows, int64_t K, float eps) {
  CanonicalMode mode;
  for_rows(the_pool(), rows, [=](int64_t m) {
    add_normalise(x + m * K, residual + m * K, weight, y + m * K, total + m * K, K, eps);
  });
}

// x: [T, H, D]; cos, sin: [T, R].
void gnomon_rotary(const float* x, const float* cos, const float* sin, float* y, int64_t T, int64_t H, int64_t D,
                   int64_t R) {
  CanonicalMode mode;
  for_rows(the_pool(), T, [=](int64_t t) {
    for (int64_t h = t * H; h < (t + 1) * H; ++h) rotate(x + h * D, cos + t * R, sin + t * R, y + h * D, R, D);
  });
}

// x: [rows, 2F], gate then up.
void gnomon_silu_mul(const float* x, float* y, int64_t rows, int64_t F) {
  CanonicalMode mode;
  for_rows(the_pool(), rows, [=](int64_t m) { silu_mul(x + m * 2 * F, y + m * F, F); });
}

void gnomon_gelu_mul(const float* x, float* y, int64_t rows, int64_t F) {
  CanonicalMode mode;
  for_rows(the_pool(), rows, [=](int64_t m) { gelu_mul(x + m * 2 * F, y + m * F, F); });
}

// q: [T, H, D]; keys, values: [pages, G, B, D]; tables: [S, P]; sequence_of, positions: [T]; out: [T, H, D].
// window <= 0: none. softcap <= 0: none.
void gnomon_attention(const float* q, const float* keys, const float* values, const int32_t* tables,
                      const int32_t* sequence_of, const int64_t* positions, float* out, int64_t T, int64_t H, int64_t G,
                      int64_t D, int64_t P, float scale, int64_t window, float softcap) {
  CanonicalMode mode;
  AttentionShape shape{H, G, D, P, scale, window, softcap};
  attention(the_pool(), shape, q, keys, values, tables, sequence_of, positions, out, T);
}

// A run of layers; see decoder.h. 0: a weight of an unknown kind.
int gnomon_layers(const Layer* layers, int64_t count, const Step* step, float* const* keys, float* const* values,
                  float* normed, float* residual, const SideRows* groups, int64_t grouped) {
  CanonicalMode mode;
  return run_layers(the_pool(), layers, count, *step, keys, values, normed, residual, groups, grouped);
}

void gnomon_softmax(const float* x, float* y, int64_t rows, int64_t K) {
  CanonicalMode mode;
  for_rows(the_pool(), rows, [=](int64_t m) { softmax(x + m * K, y + m * K, K); });
}

void gnomon_layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t K,
                       float eps) {
  CanonicalMode mode;
  for_rows(the_pool(), rows, [=](int64_t m) { layer_norm(x + m * K, weight, bias, y + m * K, K, eps); });
}

// which: see rowwise.h.
void gnomon_activate(int64_t which, const float* x, float* y, int64_t count) {
  CanonicalMode mode;
  activate(the_pool(), Activation(which), x, y, count);
}

// normaliser: [rows] float64, log(sum(exp(row))).
void gnomon_logsumexp(const float* x, double* normaliser, int64_t rows, int64_t V) {
  CanonicalMode mode;
  the_pool().run(rows, [=](int64_t m) { normaliser[m] = logsumexp(x + m * V, V); });
}

void gnomon_exp(const float* x, float* y, int64_t count) {
  CanonicalMode mode;
  for (int64_t i = 0; i < count; ++i) y[i] = exp1(x[i]);
}

float gnomon_dot16(const float* a, const float* b, int64_t K) {
  CanonicalMode mode;
  return dot16(a, b, K);
}

}  // extern "C"
