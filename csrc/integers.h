// Exact integer products: sixteen int32 lanes, each adding four products of an unsigned and a signed byte.
//
// Integer sums are exact, hence order-free: every instruction set may use its own instruction. Where two byte products
// are first added in sixteen bits, the operands are kept small enough that nothing saturates.
#pragma once

#include "lanes.h"

namespace gnomon {

#if defined(__AVX512F__)

// Sixty-four bytes: of lane l, bytes 4l..4l+3.
struct Bytes {
  __m512i v;
  static Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
};
template <int SHIFT>
inline Bytes masked(Bytes b, uint32_t mask) {  // (b >> SHIFT, or << -SHIFT) & mask, by 32-bit lanes
  __m512i shifted = SHIFT >= 0 ? _mm512_srli_epi32(b.v, SHIFT >= 0 ? SHIFT : 0)
                               : _mm512_slli_epi32(b.v, SHIFT < 0 ? -SHIFT : 0);
  return {_mm512_and_si512(shifted, _mm512_set1_epi32(int(mask)))};
}
inline Bytes either(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }

struct Ints {
  __m512i v;
  static Ints all(int32_t x) { return {_mm512_set1_epi32(x)}; }
};
inline Lanes to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }

// WIDE: bytes of `w` may exceed 127.
template <bool WIDE>
inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  __m512i spread = _mm512_set1_epi32(four);
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(sum.v, w.v, spread)};
#else
  const __m512i ones = _mm512_set1_epi16(1);
  Bytes low = WIDE ? masked<0>(w, 0x7f7f7f7f) : w;
  __m512i added = _mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_maddubs_epi16(low.v, spread), ones));
  if (WIDE) {
    __m512i top = _mm512_maddubs_epi16(masked<1>(w, 0x40404040).v, spread);
    added = _mm512_add_epi32(added, _mm512_madd_epi16(top, _mm512_set1_epi16(2)));
  }
  return {added};
#endif
}

#elif defined(__AVX2__) && defined(__FMA__)

struct Bytes {
  __m256i v[2];
  static Bytes load(const uint8_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {{_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)}};
  }
};
template <int SHIFT>
inline Bytes masked(Bytes b, uint32_t mask) {
  Bytes r;
  for (int i = 0; i < 2; ++i) {
    __m256i shifted = SHIFT >= 0 ? _mm256_srli_epi32(b.v[i], SHIFT >= 0 ? SHIFT : 0)
                                 : _mm256_slli_epi32(b.v[i], SHIFT < 0 ? -SHIFT : 0);
    r.v[i] = _mm256_and_si256(shifted, _mm256_set1_epi32(int(mask)));
  }
  return r;
}
inline Bytes either(Bytes a, Bytes b) {
  return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
}

struct Ints {
  __m256i v[2];
  static Ints all(int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
};
inline Lanes to_float(Ints a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }

template <bool WIDE>
inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i spread = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1), twos = _mm256_set1_epi16(2);
  Bytes low = WIDE ? masked<0>(w, 0x7f7f7f7f) : w, high = masked<1>(w, 0x40404040);
  for (int i = 0; i < 2; ++i) {
    sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(low.v[i], spread), ones));
    if (WIDE) sum.v[i] = _mm256_add_epi32(sum.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(high.v[i], spread), twos));
  }
  return sum;
}

#else

struct Bytes {
  uint8_t v[64];
  static Bytes load(const uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, 64);
    return r;
  }
};
template <int SHIFT>
inline Bytes masked(Bytes b, uint32_t mask) {
  for (int l = 0; l < 16; ++l) {
    uint32_t lane;
    std::memcpy(&lane, b.v + 4 * l, 4);
    lane = (SHIFT >= 0 ? lane >> (SHIFT >= 0 ? SHIFT : 0) : lane << (SHIFT < 0 ? -SHIFT : 0)) & mask;
    std::memcpy(b.v + 4 * l, &lane, 4);
  }
  return b;
}
inline Bytes either(Bytes a, Bytes b) {
  for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
  return a;
}

struct Ints {
  int32_t v[16];
  static Ints all(int32_t x) {
    Ints r;
    for (int32_t& lane : r.v) lane = x;
    return r;
  }
};
inline Lanes to_float(Ints a) {
  Lanes r;
  for (int l = 0; l < 16; ++l) r.v[l] = float(a.v[l]);
  return r;
}

template <bool WIDE>
inline Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  for (int l = 0; l < 16; ++l)
    for (int i = 0; i < 4; ++i) sum.v[l] += int32_t(w.v[4 * l + i]) * int32_t(x[i]);
  return sum;
}

#endif

}  // namespace gnomon
