// Products x W^T + b for every way a weight can lie in memory.
#pragma once

#include "elementary.h"
#include "quantized.h"

namespace gnomon {

constexpr int64_t COLUMNS = 64;  // outputs of one task where there are many rows

// One [N, K] weight. kind: 0 float32 rows, 1 bfloat16 rows, else a quantised kind's panels. Python's ctypes mirrors this.
struct Weight {
  const void* data;
  const float* bias;  // [N] or null
  int64_t n, k, kind;
};

constexpr int64_t LEAD = 8192;  // bytes asked for ahead: what memory delivers during its latency

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
constexpr int ROWS = 6, WIDE = 4, FEW = 4;
#else
constexpr int ROWS = 2, WIDE = 4, FEW = 2;
#endif

template <int R, int C, bool AHEAD, typename W>
inline void strip(const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t ldy, int64_t first,
                  int64_t last) {
  int64_t n = first;
  for (; n + C <= last; n += C) tile<R, C, AHEAD>(x, w + n * K, bias ? bias + n : nullptr, y + n, K, ldy);
  for (; n < last; ++n) tile<R, 1>(x, w + n * K, bias ? bias + n : nullptr, y + n, K, ldy);
}

// How the lanes of sixteen weights lie while a stream of them is read, and how far ahead it is asked for (by trial).
template <typename W>
struct Streamed;
template <>
struct Streamed<float> {
  using Group = Lanes;
  static constexpr int64_t SOON = 2048;
};
template <>
struct Streamed<uint16_t> {
  using Group = Split;
  static constexpr int64_t SOON = 12288;
};

// Rows as streamed weights meet them: [M, K to the next sixteen], zeros behind; of bfloat16, even inputs before odd ones.
template <typename W>
const float* laid_out(const float* x, int64_t M, int64_t K) {
  static thread_local std::vector<float> rows;
  const int64_t padded = (K + 15) / 16 * 16;
  rows.assign(size_t(M * padded), 0.0f);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) {
      int64_t place = sizeof(W) == 2 ? k / 16 * 16 + k % 2 * 8 + k % 16 / 2 : k;
      rows[size_t(m * padded + place)] = x[m * K + k];
    }
  return rows.data();
}

// Few rows, bound by memory: column after column, so that the weight is read as the one stream it is. x: laid out.
template <int R, typename W>
inline void stream(const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t ldy, int64_t first,
                   int64_t last) {
  using Group = typename Streamed<W>::Group;
  constexpr int64_t LINE = 64 / int64_t(sizeof(W));
  const int64_t padded = (K + 15) / 16 * 16;
  for (int64_t n = first; n < last; n += 4) {
    const int64_t columns = last - n < 4 ? last - n : 4;
    Lanes sums[R][4];
    for (int64_t c = 0; c < columns; ++c) {
      const W* column = w + (n + c) * K;
      Group own[R];
      for (int r = 0; r < R; ++r) own[r] = Group::zero();
      int64_t k = 0;
      for (; k + LINE <= K; k += LINE) {
        ask_for<64>(reinterpret_cast<const char*>(column + k) + Streamed<W>::SOON);
        for (int64_t j = k; j < k + LINE; j += 16) {
          Group weight = Group::load(column + j);
          for (int r = 0; r < R; ++r) own[r] = fma(weight, Group::load(x + r * padded + j), own[r]);
        }
      }
      for (; k < K; k += 16) {
        W tail[16] = {};
        std::memcpy(tail, column + k, size_t(K - k < 16 ? K - k : 16) * sizeof(W));
        Group weight = Group::load(tail);
        for (int r = 0; r < R; ++r) own[r] = fma(weight, Group::load(x + r * padded + k), own[r]);
      }
      for (int r = 0; r < R; ++r) sums[r][c] = joined(own[r]);
    }
    for (int64_t c = columns; c < 4; ++c)
      for (int r = 0; r < R; ++r) sums[r][c] = Lanes::zero();
    for (int r = 0; r < R; ++r) {
      float four[4];
      tree4(sums[r][0], sums[r][1], sums[r][2], sums[r][3], four);
      for (int64_t c = 0; c < columns; ++c) y[r * ldy + n + c] = bias ? four[c] + bias[n + c] : four[c];
    }
  }
}

template <int R, typename W>
inline void stream_rows(int64_t rows, const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t ldy,
                        int64_t first, int64_t last) {
  if constexpr (R > 1) {
    if (rows < R) return stream_rows<R - 1>(rows, x, w, bias, y, K, ldy, first, last);
  }
  stream<R>(x, w, bias, y, K, ldy, first, last);
}

// Up to R rows by the columns first..last, in tiles.
template <int R, bool AHEAD, typename W>
inline void strip_rows(int64_t rows, const float* x, const W* w, const float* bias, float* y, int64_t K, int64_t ldy,
                       int64_t first, int64_t last) {
  if constexpr (R > 1) {
    if (rows < R) return strip_rows<R - 1, AHEAD>(rows, x, w, bias, y, K, ldy, first, last);
  }
  strip<R, WIDE, AHEAD>(x, w, bias, y, K, ldy, first, last);
}

template <typename W>
void dense_linear(Pool& pool, const float* x, const W* w, const float* bias, float* y, int64_t ldy, int64_t M, int64_t K,
                  int64_t N) {
  if (M < 1) return;
  if (M <= FEW) {
    const float* rows = laid_out<W>(x, M, K);
    for_ranges(pool, true, N, COLUMNS, [=](int64_t first, int64_t last) {
      stream_rows<FEW>(M, rows, w, bias, y, K, ldy, first, last);
    });
    return;
  }
  for_ranges(pool, false, N, COLUMNS, [=](int64_t first, int64_t last) {
    // The first strip reads the weights from memory, the others from the cache.
    strip_rows<ROWS, true>(M, x, w, bias, y, K, ldy, first, last);
    for (int64_t m = ROWS; m < M; m += ROWS)
      strip_rows<ROWS, false>(M - m, x + m * K, w, bias, y + m * ldy, K, ldy, first, last);
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
