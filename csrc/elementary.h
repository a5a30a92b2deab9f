// Own exp, and what is composed of it: no libm, no estimates, one path for every element.
//
// Range reduction by the 1.5 * 2^23 trick, two-term Cody-Waite, degree-5 core; at most 0.998 ulp from the true value.
#pragma once

#include "lanes.h"

namespace gnomon {

inline float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

inline float exp1(float x) {
  const float low = -87.33654f, high = 88.37626f, magic = 12582912.0f;
  float clamped = x < low ? low : (x > high ? high : x);
  float shifted = fma1(clamped, 1.44269504088896341f, magic);
  float n = shifted - magic;
  float r = fma1(n, -0.693359375f, clamped);
  r = fma1(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fma1(p, r, 1.3981999507e-3f);
  p = fma1(p, r, 8.3334519073e-3f);
  p = fma1(p, r, 4.1665795894e-2f);
  p = fma1(p, r, 1.6666665459e-1f);
  p = fma1(p, r, 5.0000001201e-1f);
  float s = fma1(p, r * r, r) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &s, 4);
  bits += int32_t(n) << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  result = x < low ? 0.0f : result;
  return x == x ? result : __builtin_nanf("");
}

inline float silu1(float x) { return x / (1.0f + exp1(-x)); }

inline float tanh1(float x) { return 1.0f - 2.0f / (1.0f + exp1(2.0f * x)); }

inline float gelu1(float x) {
  float inner = 0.7978845608028654f * fma1(0.044715f * x * x, x, x);
  return 0.5f * x * (1.0f + tanh1(inner));
}

}  // namespace gnomon
