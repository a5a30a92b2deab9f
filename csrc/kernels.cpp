// The canonical operators as a plain C interface, compiled once per instruction set.
//
// Every output element is computed in an order that its shape alone fixes; register tiles and threads only choose which
// elements are computed together. Shapes in comments: M rows, N outputs, K inputs, D head size, B = 64 keys of a page.
#include <map>
#include <vector>

#include "elementary.h"
#include "pool.h"

namespace gnomon {

constexpr int64_t PAGE = 64;
constexpr int64_t COLUMNS = 64;  // outputs of one task: the same whatever the number of threads

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

// dot16 of R rows with C columns: each of the R * C sums is its own sixteen lanes over K, then one tree.
template <int R, int C, typename W>
inline void tile(const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t N) {
  Lanes sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = Lanes::zero();
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    Lanes columns[C];
    for (int c = 0; c < C; ++c) columns[c] = Lanes::load(w + c * K + k);
    for (int r = 0; r < R; ++r) {
      Lanes row = Lanes::load(x + r * K + k);
      for (int c = 0; c < C; ++c) sums[r][c] = fma(columns[c], row, sums[r][c]);
    }
  }
  if (k < K) {
    for (int c = 0; c < C; ++c) {
      Lanes column = load_tail(w + c * K + k, K - k);
      for (int r = 0; r < R; ++r) sums[r][c] = fma(column, load_tail(x + r * K + k, K - k), sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float sum = tree(sums[r][c]);
      y[r * N + c] = bias ? sum + bias[c] : sum;
    }
}

#if defined(__AVX512F__)
constexpr int ROWS = 4, WIDE = 4, ALONE = 8;
#else
constexpr int ROWS = 2, WIDE = 2, ALONE = 4;
#endif

template <typename W>
void linear(const float* x, const W* w, const float* bias, float* y, int64_t M, int64_t K, int64_t N) {
  the_pool().run((N + COLUMNS - 1) / COLUMNS, [=](int64_t task) {
    int64_t first = task * COLUMNS, last = first + COLUMNS < N ? first + COLUMNS : N;
    auto at = [&](int64_t n) { return bias ? bias + n : nullptr; };
    int64_t m = 0;
    for (; m + ROWS <= M; m += ROWS) {
      int64_t n = first;
      for (; n + WIDE <= last; n += WIDE) tile<ROWS, WIDE>(x + m * K, w + n * K, at(n), y + m * N + n, K, N);
      for (; n < last; ++n) tile<ROWS, 1>(x + m * K, w + n * K, at(n), y + m * N + n, K, N);
    }
    for (; m < M; ++m) {
      int64_t n = first;
      for (; n + ALONE <= last; n += ALONE) tile<1, ALONE>(x + m * K, w + n * K, at(n), y + m * N + n, K, N);
      for (; n < last; ++n) tile<1, 1>(x + m * K, w + n * K, at(n), y + m * N + n, K, N);
    }
  });
}

inline float dot16(const float* a, const float* b, int64_t K) {
  float y;
  tile<1, 1>(a, b, static_cast<const float*>(nullptr), &y, K, 1);
  return y;
}

inline float sum16(const float* x, int64_t K) {
  Lanes sums = Lanes::zero();
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) sums = add(sums, Lanes::load(x + k));
  if (k < K) sums = add(sums, load_tail(x + k, K - k));
  return tree(sums);
}

// One query row over its keys first..last: exact maximum, fixed blocks of PAGE keys, blocks added in order.
void attend(const float* q, const float* keys, const float* values, const int32_t* table, float* out, float* scores,
            int64_t first, int64_t last, int64_t group, int64_t groups, int64_t D, float scale, float softcap) {
  int64_t first_block = first / PAGE, last_block = last / PAGE;
  float top = -__builtin_inff();
  for (int64_t j = first; j <= last; ++j) {
    const float* key = keys + ((table[j / PAGE] * groups + group) * PAGE + j % PAGE) * D;
    float s = dot16(q, key, D) * scale;
    if (softcap > 0) s = softcap * tanh1(s / softcap);
    scores[j] = s;
    top = s > top ? s : top;
  }
  for (int64_t d = 0; d < D; ++d) out[d] = 0.0f;
  float total = 0.0f;
  for (int64_t b = first_block; b <= last_block; ++b) {
    float weights[PAGE] = {};
    int64_t low = b * PAGE < first ? first : b * PAGE, high = (b + 1) * PAGE - 1 > last ? last : (b + 1) * PAGE - 1;
    for (int64_t j = low; j <= high; ++j) weights[j % PAGE] = exp1(scores[j] - top);
    total = total + sum16(weights, PAGE);
    const float* page = values + (table[b] * groups + group) * PAGE * D;
    for (int64_t d = 0; d < D; d += 16) {
      int64_t count = D - d < 16 ? D - d : 16;
      Lanes sum = Lanes::zero();
      for (int64_t j = low; j <= high; ++j) {
        const float* value = page + (j % PAGE) * D + d;
        Lanes lane = count == 16 ? Lanes::load(value) : load_tail(value, count);
        sum = fma(Lanes::all(weights[j % PAGE]), lane, sum);
      }
      float parts[16];
      sum.store(parts);
      for (int64_t i = 0; i < count; ++i) out[d + i] = out[d + i] + parts[i];
    }
  }
  for (int64_t d = 0; d < D; ++d) out[d] = out[d] / total;
}

void normalise(const float* x, const float* weight, float* y, int64_t K, float eps) {
  float scale = 1.0f / __builtin_sqrtf(dot16(x, x, K) / float(K) + eps);
  for (int64_t k = 0; k < K; ++k) y[k] = (x[k] * scale) * weight[k];
}

constexpr int64_t ROWS_OF_A_TASK = 16;

template <typename F>
void for_rows(int64_t rows, F&& f) {
  the_pool().run((rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK, [&](int64_t task) {
    int64_t end = (task + 1) * ROWS_OF_A_TASK < rows ? (task + 1) * ROWS_OF_A_TASK : rows;
    for (int64_t row = task * ROWS_OF_A_TASK; row < end; ++row) f(row);
  });
}

}  // namespace gnomon

using namespace gnomon;

extern "C" {

// Raised whenever a definition in this library changes by a bit.
int gnomon_kernel_version() { return 1; }

const char* gnomon_isa() {
#if defined(__AVX512F__)
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
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__) && defined(__FMA__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

void gnomon_threads(int threads) { choose_pool(threads); }

void gnomon_linear_f32(const float* x, const float* w, const float* bias, float* y, int64_t M, int64_t K, int64_t N) {
  CanonicalMode mode;
  linear(x, w, bias, y, M, K, N);
}

void gnomon_linear_bf16(const float* x, const uint16_t* w, const float* bias, float* y, int64_t M, int64_t K, int64_t N) {
  CanonicalMode mode;
  linear(x, w, bias, y, M, K, N);
}

void gnomon_rms_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t K, float eps) {
  CanonicalMode mode;
  for_rows(rows, [=](int64_t m) { normalise(x + m * K, weight, y + m * K, K, eps); });
}

void gnomon_add_rms_norm(const float* x, const float* residual, const float* weight, float* y, float* total,
                         int64_t rows, int64_t K, float eps) {
  CanonicalMode mode;
  for_rows(rows, [=](int64_t m) {
    for (int64_t k = m * K; k < (m + 1) * K; ++k) total[k] = x[k] + residual[k];
    normalise(total + m * K, weight, y + m * K, K, eps);
  });
}

// x: [T, H, D]; cos, sin: [T, R]; the first 2R channels of each head turn, the rest pass.
void gnomon_rotary(const float* x, const float* cos, const float* sin, float* y, int64_t T, int64_t H, int64_t D,
                   int64_t R) {
  CanonicalMode mode;
  for_rows(T, [=](int64_t t) {
    const float *c = cos + t * R, *s = sin + t * R;
    for (int64_t h = 0; h < H; ++h) {
      const float* a = x + (t * H + h) * D;
      float* b = y + (t * H + h) * D;
      for (int64_t i = 0; i < R; ++i) {
        b[i] = a[i] * c[i] - a[R + i] * s[i];
        b[R + i] = a[R + i] * c[i] + a[i] * s[i];
      }
      for (int64_t i = 2 * R; i < D; ++i) b[i] = a[i];
    }
  });
}

void gnomon_silu_mul(const float* x, float* y, int64_t rows, int64_t F) {
  CanonicalMode mode;
  for_rows(rows, [=](int64_t m) {
    const float *gate = x + 2 * m * F, *up = gate + F;
    for (int64_t f = 0; f < F; ++f) y[m * F + f] = silu1(gate[f]) * up[f];
  });
}

void gnomon_gelu_mul(const float* x, float* y, int64_t rows, int64_t F) {
  CanonicalMode mode;
  for_rows(rows, [=](int64_t m) {
    const float *gate = x + 2 * m * F, *up = gate + F;
    for (int64_t f = 0; f < F; ++f) y[m * F + f] = gelu1(gate[f]) * up[f];
  });
}

// q: [T, H, D]; keys, values: [pages, G, PAGE, D]; tables: [S, P]; sequence_of, positions: [T]; out: [T, H, D].
// window <= 0: none. softcap <= 0: none.
void gnomon_attention(const float* q, const float* keys, const float* values, const int32_t* tables,
                      const int32_t* sequence_of, const int64_t* positions, float* out, int64_t T, int64_t H, int64_t G,
                      int64_t D, int64_t P, float scale, int64_t window, float softcap) {
  CanonicalMode mode;
  the_pool().run(T * G, [=](int64_t task) {
    int64_t t = task / G, group = task % G, last = positions[t];
    int64_t first = window > 0 && last - window + 1 > 0 ? last - window + 1 : 0;
    static thread_local std::vector<float> scores;
    if (int64_t(scores.size()) <= last) scores.resize(size_t(last + 1024));
    for (int64_t h = group * (H / G); h < (group + 1) * (H / G); ++h)
      attend(q + (t * H + h) * D, keys, values, tables + sequence_of[t] * P, out + (t * H + h) * D, scores.data(), first,
             last, group, G, D, scale, softcap);
  });
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
