// Row by row: softmax, layer norm, plain activations, and log-probabilities in float64.
//
// What modules outside the decoder need (gnomon/kernels/library.py). The float64 part is gnomon/engine/elementary.py
// operation for operation, so a trainer's log-probability has the bits of the sampler's.
#pragma once

#include <vector>

#include "decoder.h"

namespace gnomon {

inline double exp64(double x) {
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding and taking it away rounds to an integer
  double low = x < -708.0 ? -708.0 : x, clamped = low > 709.0 ? 709.0 : low;
  double n = (clamped * 0x1.71547652b82fep+0 + magic) - magic;
  double r = clamped - n * 0x1.62e42fefap-1;
  r = r - n * 0x1.cf79abc9e3b3ap-40;
  const double terms[14] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                            1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0};
  double p = terms[0];
  for (int i = 1; i < 14; ++i) p = p * r + terms[i];
  int64_t bits = (int64_t(n) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, 8);
  return x < -708.0 ? 0.0 : p * power;
}

inline double log64(double x) {
  int exponent;
  double m = std::frexp(x, &exponent), low = m < 0x1.6a09e667f3bcdp-1 ? 1.0 : 0.0;
  m = m + m * low;
  double e = double(exponent) - low, f = m - 1.0, s = f / (m + 1.0), square = s * s, p = 1.0 / 23.0;
  for (int k = 10; k >= 0; --k) p = p * square + 1.0 / double(2 * k + 1);
  p = p * s;
  p = p * 2.0;
  p = p + e * 0x1.cf79abc9e3b3ap-40;
  return p + e * 0x1.62e42fefap-1;
}

// log(sum(exp(row))): the sum by halving, one fixed tree for each length.
inline double logsumexp(const float* row, int64_t V) {
  static thread_local std::vector<double> parts;
  parts.resize(size_t(V));
  double* part = parts.data();
  float greatest = row[0];
  for (int64_t v = 1; v < V; ++v) greatest = row[v] > greatest ? row[v] : greatest;
  const double top = greatest;
  for (int64_t v = 0; v < V; ++v) part[v] = exp64(double(row[v]) - top);
  for (int64_t n = V; n > 1;) {
    int64_t half = (n + 1) / 2;
    for (int64_t i = 0; i < n - half; ++i) part[i] = part[i] + part[half + i];
    n = half;
  }
  return top + log64(part[0]);
}

inline void softmax(const float* x, float* y, int64_t K) {
  float top = x[0];
  for (int64_t k = 1; k < K; ++k) top = x[k] > top ? x[k] : top;
  for (int64_t k = 0; k < K; ++k) y[k] = exp1(x[k] - top);
  const float sum = sum16(y, K);
  for (int64_t k = 0; k < K; ++k) y[k] = y[k] / sum;
}

// Two passes: the mean, then the centred values' variance. bias may be null.
inline void layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t K, float eps) {
  const float mean = sum16(x, K) / float(K);
  for (int64_t k = 0; k < K; ++k) y[k] = x[k] - mean;
  const float scale = 1.0f / __builtin_sqrtf(dot16(y, y, K) / float(K) + eps);
  for (int64_t k = 0; k < K; ++k) y[k] = (y[k] * scale) * weight[k];
  for (int64_t k = 0; bias && k < K; ++k) y[k] = y[k] + bias[k];
}

// x * Phi(x). erfc(z) = t exp(-z^2 + P(t)), t = 2 / (2 + z): P fitted on z in [0, 6], relative error 1e-10.
inline float gelu_erf1(float x) {
  const double terms[13] = {1.2274669627272709e-06, 4.639953926570482e-07,  -1.3294706457593935e-05,
                            1.085559250251194e-05,  8.124435953193092e-05,  -0.0001959775844027726,
                            -0.00033013778771450033, 0.002029053603502443,  0.0004935176904777743,
                            -0.021523677726912008,  0.005570762865573047,   0.5153126882572084,
                            -0.5014367259303846};
  const double wide = double(x), z = (wide < 0.0 ? -wide : wide) * 0.7071067811865476;
  const double t = 2.0 / (2.0 + z), k = (t - 0.625) / 0.375;
  double p = terms[0];
  for (int i = 1; i < 13; ++i) p = p * k + terms[i];
  const double tail = z > 6.0 ? 0.0 : 0.5 * (t * exp64(p - z * z));
  return float(wide * (wide < 0.0 ? tail : 1.0 - tail));
}

enum Activation : int64_t { SILU = 0, GELU = 1, SIGMOID = 2, GELU_ERF = 3 };

// Pieces of a fixed size, so that no element's path depends on where a thread begins.
inline void activate(Pool& pool, Activation which, const float* x, float* y, int64_t count) {
  const int64_t PIECE = 16384;
  pool.run((count + PIECE - 1) / PIECE, [=](int64_t task) {
    int64_t end = (task + 1) * PIECE < count ? (task + 1) * PIECE : count;
    if (which == SILU)
      for (int64_t i = task * PIECE; i < end; ++i) y[i] = silu1(x[i]);
    else if (which == GELU)
      for (int64_t i = task * PIECE; i < end; ++i) y[i] = gelu1(x[i]);
    else if (which == GELU_ERF)
      for (int64_t i = task * PIECE; i < end; ++i) y[i] = gelu_erf1(x[i]);
    else
      for (int64_t i = task * PIECE; i < end; ++i) y[i] = 1.0f / (1.0f + exp1(-x[i]));
  });
}

}  // namespace gnomon
