// What is done to one row alone: norms, rotation, gates; and the loop over rows, in tasks of a fixed size.
#pragma once

#include "linear.h"

namespace gnomon {

inline void normalise(const float* x, const float* weight, float* y, int64_t K, float eps) {
  float scale = 1.0f / __builtin_sqrtf(dot16(x, x, K) / float(K) + eps);
  for (int64_t k = 0; k < K; ++k) y[k] = (x[k] * scale) * weight[k];
}

inline void add_normalise(const float* x, const float* residual, const float* weight, float* y, float* total, int64_t K,
                          float eps) {
  for (int64_t k = 0; k < K; ++k) total[k] = x[k] + residual[k];
  normalise(total, weight, y, K, eps);
}

// The first 2R channels of a head turn (pairs i, i + R), the rest pass.
inline void rotate(const float* a, const float* c, const float* s, float* b, int64_t R, int64_t D) {
  for (int64_t i = 0; i < R; ++i) {
    b[i] = a[i] * c[i] - a[R + i] * s[i];
    b[R + i] = a[R + i] * c[i] + a[i] * s[i];
  }
  for (int64_t i = 2 * R; i < D; ++i) b[i] = a[i];
}

inline void silu_mul(const float* x, float* y, int64_t F) {
  for (int64_t f = 0; f < F; ++f) y[f] = silu1(x[f]) * x[F + f];
}

inline void gelu_mul(const float* x, float* y, int64_t F) {
  for (int64_t f = 0; f < F; ++f) y[f] = gelu1(x[f]) * x[F + f];
}

template <typename F>
void for_rows(Pool& pool, int64_t rows, F&& f) {
  const int64_t ROWS_OF_A_TASK = 16;
  pool.run((rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK, [&](int64_t task) {
    int64_t end = (task + 1) * ROWS_OF_A_TASK < rows ? (task + 1) * ROWS_OF_A_TASK : rows;
    for (int64_t row = task * ROWS_OF_A_TASK; row < end; ++row) f(row);
  });
}

}  // namespace gnomon
