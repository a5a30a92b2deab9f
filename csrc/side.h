// What patches add beside the weights: y += up (down x) for some rows of a product, in float32, whatever kind the
// product's own weight is. Each sum is a dot16, so the bits are those of two gnomon_linear calls and an addition.
#pragma once

#include "linear.h"

namespace gnomon {

// The seven projections of a layer: query, key, value, attention out, gate, up, down.
constexpr int64_t SLOTS = 7;
constexpr int64_t SIDE_ROWS = 16;  // rows of one task

// One low-rank delta; up null: none. offset: its first column in the fused product. Python's ctypes mirrors these.
struct SideDelta {
  const float *up, *down;  // [outputs, rank], [rank, inputs]
  int64_t outputs, inputs, rank, offset;
};

// Rows [begin, end) and their patches in order; a patch is SLOTS deltas per layer.
struct SideRows {
  int64_t begin, end;
  const SideDelta* const* patches;
  int64_t count;
};

// y[m, n] = dot16(x[m], w[n]) for a few rows.
inline void few_rows(const float* x, const float* w, float* y, int64_t M, int64_t K, int64_t N, int64_t ldy) {
  int64_t m = 0;
  auto rows = [&](auto pair, int64_t count) {
    int64_t n = 0;
    for (; n + 4 <= N; n += 4) {
      if constexpr (decltype(pair)::value) tile<2, 4>(x + m * K, w + n * K, nullptr, y + m * ldy + n, K, ldy);
      else tile<1, 4>(x + m * K, w + n * K, nullptr, y + m * ldy + n, K, ldy);
    }
    for (; n < N; ++n)
      for (int64_t i = m; i < m + count; ++i) tile<1, 1>(x + i * K, w + n * K, nullptr, y + i * ldy + n, K, ldy);
    m += count;
  };
  while (m + 2 <= M) rows(std::true_type{}, 2);
  while (m < M) rows(std::false_type{}, 1);
}

inline void add_delta(const SideDelta& d, const float* x, float* y, int64_t M, int64_t ldy) {
  static thread_local std::vector<float> inner, sums;
  inner.resize(size_t(M * d.rank)), sums.resize(size_t(M * COLUMNS));
  few_rows(x, d.down, inner.data(), M, d.inputs, d.rank, d.rank);
  for (int64_t first = 0; first < d.outputs; first += COLUMNS) {
    int64_t count = first + COLUMNS < d.outputs ? COLUMNS : d.outputs - first;
    few_rows(inner.data(), d.up + first * d.rank, sums.data(), M, d.rank, count, COLUMNS);
    for (int64_t m = 0; m < M; ++m) {
      float* to = y + m * ldy + d.offset + first;
      for (int64_t n = 0; n < count; ++n) to[n] = to[n] + sums[size_t(m * COLUMNS + n)];
    }
  }
}

// Slots [slot, slot + slots) of one layer, which share the input x [T, K] and the output y [T, ldy].
inline void add_sides(Pool& pool, const SideRows* groups, int64_t count, int64_t layer, int64_t slot, int64_t slots,
                      const float* x, int64_t K, float* y, int64_t ldy) {
  int64_t blocks = 0;
  for (int64_t g = 0; g < count; ++g) blocks += (groups[g].end - groups[g].begin + SIDE_ROWS - 1) / SIDE_ROWS;
  pool.run(blocks * slots, [=](int64_t task) {
    int64_t block = task / slots, which = layer * SLOTS + slot + task % slots, g = 0;
    for (;; ++g) {
      int64_t own = (groups[g].end - groups[g].begin + SIDE_ROWS - 1) / SIDE_ROWS;
      if (block < own) break;
      block -= own;
    }
    int64_t begin = groups[g].begin + block * SIDE_ROWS;
    int64_t rows = begin + SIDE_ROWS < groups[g].end ? SIDE_ROWS : groups[g].end - begin;
    for (int64_t p = 0; p < groups[g].count; ++p) {
      const SideDelta& delta = groups[g].patches[p][which];
      if (delta.up) add_delta(delta, x + begin * K, y + begin * ldy, rows, ldy);
    }
  });
}

}  // namespace gnomon
