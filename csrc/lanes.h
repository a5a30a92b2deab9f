// Sixteen logical float32 lanes: the unit in which every reduction is defined, whatever the instruction set.
//
// One header wraps exactly what portable code cannot say: a fused multiply-add and wide loads. AVX-512 holds the lanes in
// one register, AVX2 in two, generic code in an array with fmaf. The order of operations is the same in all three, so the
// bits are too. Compiled with -ffp-contract=off: every fused multiply-add in the library is one written here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace gnomon {

// An IEEE half, as quantised files store their scales; widening is exact.
struct Half {
  uint16_t bits;
};

#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
  static Lanes zero() { return {_mm512_setzero_ps()}; }
  static Lanes all(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Lanes load(const uint16_t* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
  }
  static Lanes load(const Half* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }

#elif defined(__AVX2__) && defined(__FMA__)

struct Lanes {
  __m256 v[2];
  static Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Lanes all(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static Lanes load(const uint16_t* p) {
    Lanes r;
    for (int i = 0; i < 2; ++i) {
      __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i)));
      r.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    return r;
  }
  static Lanes load(const Half* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))}};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v[0]), _mm256_storeu_ps(p + 8, v[1]); }
};
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
}
inline Lanes add(Lanes a, Lanes b) { return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}}; }
inline Lanes mul(Lanes a, Lanes b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
inline Lanes larger(Lanes a, Lanes b) { return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}}; }

#else

inline float widen(Half half) {
  uint32_t sign = uint32_t(half.bits & 0x8000) << 16, exponent = (half.bits >> 10) & 31, fraction = half.bits & 1023;
  if (exponent == 0) {
    float small = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

struct Lanes {
  float v[16];
  static Lanes zero() { return all(0.0f); }
  static Lanes all(float x) {
    Lanes r;
    for (float& lane : r.v) lane = x;
    return r;
  }
  static Lanes load(const float* p) {
    Lanes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static Lanes load(const uint16_t* p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) {
      uint32_t bits = uint32_t(p[i]) << 16;
      std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
  }
  static Lanes load(const Half* p) {
    Lanes r;
    for (int i = 0; i < 16; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
};
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < 16; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline Lanes add(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] + b.v[i];
  return a;
}
inline Lanes mul(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] * b.v[i];
  return a;
}
inline Lanes larger(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}

#endif

// Sixteen lanes as their even and their odd ones: pairs of bfloat16 widen to this by a shift and a mask alone.
#if defined(__AVX2__) && defined(__FMA__)

struct Split {
  __m256 even, odd;
  static Split zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Split load(const uint16_t* p) {
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000u))))};
  }
  static Split load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
};
inline Split fma(Split a, Split b, Split c) {
  return {_mm256_fmadd_ps(a.even, b.even, c.even), _mm256_fmadd_ps(a.odd, b.odd, c.odd)};
}
inline Lanes joined(Split a) {
  __m256 low = _mm256_unpacklo_ps(a.even, a.odd), high = _mm256_unpackhi_ps(a.even, a.odd);
  __m256 first = _mm256_permute2f128_ps(low, high, 0x20), second = _mm256_permute2f128_ps(low, high, 0x31);
#if defined(__AVX512F__)
  __m512d low_half = _mm512_castps_pd(_mm512_castps256_ps512(first));
  return {_mm512_castpd_ps(_mm512_insertf64x4(low_half, _mm256_castps_pd(second), 1))};
#else
  return {{first, second}};
#endif
}

#else

struct Split {
  float even[8], odd[8];
  static Split zero() { return {}; }
  static Split load(const uint16_t* p) {
    Split r;
    Lanes all = Lanes::load(p);
    for (int i = 0; i < 8; ++i) r.even[i] = all.v[2 * i], r.odd[i] = all.v[2 * i + 1];
    return r;
  }
  static Split load(const float* p) {
    Split r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
};
inline Split fma(Split a, Split b, Split c) {
  for (int i = 0; i < 8; ++i) {
    c.even[i] = __builtin_fmaf(a.even[i], b.even[i], c.even[i]);
    c.odd[i] = __builtin_fmaf(a.odd[i], b.odd[i], c.odd[i]);
  }
  return c;
}
inline Lanes joined(Split a) {
  Lanes r;
  for (int i = 0; i < 8; ++i) r.v[2 * i] = a.even[i], r.v[2 * i + 1] = a.odd[i];
  return r;
}

#endif

inline Lanes joined(Lanes a) { return a; }

// The one horizontal sum: lanes 8 apart, then 4, then 2, then 1.
inline float tree(Lanes a) {
  float t[16];
  a.store(t);
  for (int width = 8; width; width /= 2)
    for (int l = 0; l < width; ++l) t[l] = t[l] + t[l + width];
  return t[0];
}

// The trees of four sums at once: the same additions in the same order, fewer instructions.
inline void tree4(Lanes a, Lanes b, Lanes c, Lanes d, float* y) {
#if defined(__AVX512F__)
  __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xee));
  __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  four = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
  four = _mm512_add_ps(four, _mm512_permute_ps(four, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(y, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, four)));
#elif defined(__AVX2__) && defined(__FMA__)
  const Lanes* sums[4] = {&a, &b, &c, &d};
  __m256 half[4];
  for (int i = 0; i < 4; ++i) half[i] = _mm256_add_ps(sums[i]->v[0], sums[i]->v[1]);
  for (int i = 0; i < 4; i += 2) {
    __m256 pair = _mm256_add_ps(_mm256_permute2f128_ps(half[i], half[i + 1], 0x20),
                                _mm256_permute2f128_ps(half[i], half[i + 1], 0x31));
    pair = _mm256_add_ps(pair, _mm256_permute_ps(pair, 0x4e));
    pair = _mm256_add_ps(pair, _mm256_permute_ps(pair, 0xb1));
    y[i] = _mm256_cvtss_f32(pair);
    y[i + 1] = _mm_cvtss_f32(_mm256_extractf128_ps(pair, 1));
  }
#else
  y[0] = tree(a), y[1] = tree(b), y[2] = tree(c), y[3] = tree(d);
#endif
}

// The last, incomplete group of sixteen, padded with +0.
template <typename T>
inline Lanes load_tail(const T* p, int64_t count) {
  T padded[16] = {};
  std::memcpy(padded, p, size_t(count) * sizeof(T));
  return Lanes::load(padded);
}

}  // namespace gnomon
