// Products x W^T + b for every way a weight can lie in memory.
#pragma once

#include "elementary.h"
#include "quantized.h"

namespace gnomon {

constexpr int64_t COLUMNS = 64;  // outputs of one task: the same whatever the number of threads

// One [N, K] weight. kind: 0 float32 rows, 1 bfloat16 rows, else a quantised kind's panels. Python's ctypes mirrors this.
struct Weight {
  const void* data;
  const float* bias;  // [N] or null
  int64_t n, k, kind;
};

constexpr int64_t LEAD = 8192;  // bytes asked for beyond the next tile: what memory delivers during its latency

// Asks for the cache lines of a later read; the processor's own prefetchers see only short streams in rows of a weight.
template <int64_t BYTES>
inline void ask_for(const char* p) {
  for (int64_t i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// dot16 of R rows with C columns: each of the R * C sums is its own sixteen lanes over K, then one tree.
// AHEAD: meanwhile ask for the columns that lie behind these.
template <int R, int C, bool AHEAD = false, typename W>
inline void tile(const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t ldy) {
  static_assert(C == 1 || C % 4 == 0, "whole groups of four, or one");
  Lanes sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = Lanes::zero();
  int64_t k = 0;
  for (; k + 16 <= K; k += 16) {
    Lanes columns[C];
    if constexpr (AHEAD) ask_for<C * 16 * int64_t(sizeof(W))>(reinterpret_cast<const char*>(w + C * K + C * k) + LEAD);
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
  for (int r = 0; r < R; ++r) {
    float* to = y + r * ldy;
    if constexpr (C == 1) to[0] = tree(sums[r][0]);
    else
      for (int c = 0; c < C; c += 4) tree4(sums[r][c], sums[r][c + 1], sums[r][c + 2], sums[r][c + 3], to + c);
    for (int c = 0; bias && c < C; ++c) to[c] = to[c] + bias[c];
  }
}

#if defined(__AVX512F__)
constexpr int ROWS = 6, WIDE = 4, ALONE = 8;
#else
constexpr int ROWS = 2, WIDE = 4, ALONE = 4;
#endif

template <int R, int C, bool AHEAD, typename W>
inline void strip(const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t ldy, int64_t first,
                  int64_t last) {
  int64_t n = first;
  for (; n + C <= last; n += C) tile<R, C, AHEAD>(x, w + n * K, bias ? bias + n : nullptr, y + n, K, ldy);
  for (; n < last; ++n) tile<R, 1>(x, w + n * K, bias ? bias + n : nullptr, y + n, K, ldy);
}

template <typename W>
void dense_linear(Pool& pool, const float* x, const W* w, const float* bias, float* y, int64_t ldy, int64_t M, int64_t K,
                  int64_t N) {
  pool.run((N + COLUMNS - 1) / COLUMNS, [=](int64_t task) {
    int64_t first = task * COLUMNS, last = first + COLUMNS < N ? first + COLUMNS : N, m = 0;
    auto rows = [&](auto strip_some, int64_t count) {
      strip_some(x + m * K, w, bias, y + m * ldy, K, ldy, first, last);
      m += count;
    };
    // The first strip reads the weights from memory, the others from the cache.
    if (M >= ROWS) rows(strip<ROWS, WIDE, true, W>, ROWS);
    else if (M >= 2) rows(strip<2, WIDE, true, W>, 2);
    else rows(strip<1, ALONE, true, W>, 1);
    while (m + ROWS <= M) rows(strip<ROWS, WIDE, false, W>, ROWS);
    while (m + 2 <= M) rows(strip<2, WIDE, false, W>, 2);
    while (m < M) rows(strip<1, ALONE, false, W>, 1);
  });
}

// y[m, n] for several weights of one input, side by side in rows of ldy. False: a weight of an unknown kind.
inline bool linear(Pool& pool, const float* x, const Weight* weights, int64_t count, float* y, int64_t ldy, int64_t M) {
  static thread_local Activations activations;
  int64_t prepared = 0;  // kinds that quantise rows alike share them
  for (int64_t i = 0; i < count; ++i) {
    const Weight& w = weights[i];
    bool known = true;
    if (w.kind == 0) {
      dense_linear(pool, x, static_cast<const float*>(w.data), w.bias, y, ldy, M, w.k, w.n);
    } else if (w.kind == 1) {
      dense_linear(pool, x, static_cast<const uint16_t*>(w.data), w.bias, y, ldy, M, w.k, w.n);
    } else {
      known = with_kind(w.kind, [&](auto kind) {
        using T = decltype(kind);
        if (prepared != T::K * 16 + T::GROUPS) quantize_rows<T>(pool, x, M, w.k, activations);
        prepared = T::K * 16 + T::GROUPS;
        quantized_linear<T>(pool, activations, static_cast<const uint8_t*>(w.data), w.bias, y, ldy, M, w.n);
      });
    }
    if (!known) return false;
    y += w.n;
  }
  return true;
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

}  // namespace gnomon
