// Products with quantised weights: bytes times bytes, exact integer sums, float32 only once per group of inputs.
//
// Weights: w = s (q - z), or s q + m where the kind has minima; s and m per output and group of inputs. They lie in
// panels of sixteen outputs, one per lane, in records of 32 or 64 inputs: scales, minima, then the bytes.
// Activations: quantised per row and per record, s = max|x| / 127, q = round-to-even(x / s).
// One output element: for each group in order, sum = fma(float(exact integer dot), s_x s_w, sum), then, where there are
// minima, sum = fma(m, s_x float(sum of the group's q_x), sum). Nothing else, whatever the number of rows.
#pragma once

#include <vector>

#include "integers.h"
#include "pool.h"

namespace gnomon {

// BITS of a weight; K: inputs of a record (and of an activation scale); GROUPS of weight scales in it; S: their type.
template <int BITS_, int K_, int GROUPS_, typename S_, bool MINIMA_, int ZERO_>
struct Kind {
  static constexpr int BITS = BITS_, K = K_, GROUPS = GROUPS_, ZERO = ZERO_;
  using S = S_;
  static constexpr bool MINIMA = MINIMA_;
  static constexpr int STEPS = K / 4;                 // four inputs of sixteen outputs are one vector of bytes
  static constexpr int GROUP_STEPS = STEPS / GROUPS;  // steps that share a scale
  static constexpr int SCALES = 16 * GROUPS * int(sizeof(S));
  static constexpr int LOW = BITS == 8 ? 64 * STEPS : 32 * STEPS;  // bytes of the low four (or all eight) bits
  static constexpr int HIGH = BITS == 5 ? 8 * STEPS : BITS == 6 ? 16 * STEPS : 0;
  static constexpr int RECORD = SCALES * (MINIMA ? 2 : 1) + LOW + HIGH;
};

// The numbers by which Python names the kinds; 0 and 1 are float32 and bfloat16 rows.
template <typename F>
bool with_kind(int64_t kind, F&& f) {
  switch (kind) {
    case 2: f(Kind<8, 64, 1, float, false, 128>()); return true;  // int8
    case 3: f(Kind<4, 32, 1, Half, false, 8>()); return true;     // Q4_0
    case 4: f(Kind<4, 32, 1, Half, true, 0>()); return true;      // Q4_1
    case 5: f(Kind<5, 32, 1, Half, false, 16>()); return true;    // Q5_0
    case 6: f(Kind<5, 32, 1, Half, true, 0>()); return true;      // Q5_1
    case 7: f(Kind<8, 32, 1, Half, false, 128>()); return true;   // Q8_0
    case 8: f(Kind<4, 32, 1, float, true, 0>()); return true;     // Q4_K
    case 9: f(Kind<5, 32, 1, float, true, 0>()); return true;     // Q5_K
    case 10: f(Kind<6, 32, 2, float, false, 32>()); return true;  // Q6_K
  }
  return false;
}

// Quantised rows of activations, in the groups of one kind.
struct Activations {
  std::vector<int8_t> q;      // [M, records * K]
  std::vector<float> scales;  // [M, records]
  std::vector<int32_t> sums;  // [M, records * GROUPS]: of q over a group
  int64_t records = 0;
};

template <typename T>
void quantize_row(const float* x, int64_t K, int64_t records, int8_t* q, float* scales, int32_t* sums) {
  for (int64_t g = 0; g < records; ++g) {
    int64_t count = K - g * T::K < T::K ? K - g * T::K : T::K;
    const float* from = x + g * T::K;
    int8_t* to = q + g * T::K;
    uint32_t largest = 0;
    for (int64_t k = 0; k < count; ++k) {
      uint32_t bits;
      std::memcpy(&bits, from + k, 4);
      bits &= 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    float top;
    std::memcpy(&top, &largest, 4);
    bool finite = largest < 0x7f800000u;
    float scale = finite ? (top < 1e-30f ? 0.0f : top / 127.0f) : __builtin_nanf("");
    float divisor = finite && scale > 0.0f ? scale : 1.0f;
    bool zero = !finite || !(scale > 0.0f);
    for (int64_t k = 0; k < T::K; ++k) {
      float shifted = (k < count && !zero ? from[k] / divisor : 0.0f) + 12582912.0f;  // rounds to even
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      to[k] = int8_t(bits - 0x4b400000);
    }
    scales[g] = scale;
    for (int s = 0; s < T::GROUPS; ++s) {
      int32_t sum = 0;
      for (int k = 0; k < T::K / T::GROUPS; ++k) sum += to[s * (T::K / T::GROUPS) + k];
      sums[g * T::GROUPS + s] = sum;
    }
  }
}

// One step's sixteen outputs by four inputs, unpacked.
template <typename T, int STEP>
inline Bytes unpack(const uint8_t* bytes) {
  if constexpr (T::BITS == 8) return Bytes::load(bytes + 64 * STEP);
  constexpr int PLANES = T::STEPS / 2, plane = STEP % PLANES;
  Bytes low = masked<(STEP < PLANES ? 0 : 4)>(Bytes::load(bytes + 64 * plane), 0x0f0f0f0f);
  if constexpr (T::BITS == 4) return low;
  if constexpr (T::BITS == 5)
    return either(low, masked<STEP - 4>(Bytes::load(bytes + T::LOW), 0x10101010));
  if constexpr (T::BITS == 6)
    return either(low, masked<2 * (STEP % 4) - 4>(Bytes::load(bytes + T::LOW + 64 * (STEP / 4)), 0x30303030));
}

template <typename T, int STEP, int LAST>
inline void unpack_all(const uint8_t* bytes, Bytes* w) {
  if constexpr (STEP < LAST) {
    w[STEP] = unpack<T, STEP>(bytes);
    unpack_all<T, STEP + 1, LAST>(bytes, w);
  }
}

// R rows by one panel of sixteen outputs.
template <typename T, int R>
inline void panel_tile(const Activations& x, int64_t m, const uint8_t* panel, const float* bias, float* y, int64_t ldy,
                       int64_t count) {
  Lanes sums[R];
  for (int r = 0; r < R; ++r) sums[r] = Lanes::zero();
  for (int64_t g = 0; g < x.records; ++g) {
    const uint8_t* record = panel + g * T::RECORD;
    const typename T::S* scales = reinterpret_cast<const typename T::S*>(record);
    Bytes w[T::STEPS];
    unpack_all<T, 0, T::STEPS>(record + T::SCALES * (T::MINIMA ? 2 : 1), w);
    for (int s = 0; s < T::GROUPS; ++s) {
      Lanes scale = Lanes::load(scales + 16 * s);
      for (int r = 0; r < R; ++r) {
        int64_t group = ((m + r) * x.records + g) * T::GROUPS + s;
        const int8_t* q = x.q.data() + ((m + r) * x.records + g) * T::K;
        float own = x.scales[(m + r) * x.records + g];
        Ints dot = Ints::all(-T::ZERO * x.sums[group]);
        for (int i = s * T::GROUP_STEPS; i < (s + 1) * T::GROUP_STEPS; ++i) dot = dot4<T::BITS == 8>(dot, w[i], q + 4 * i);
        sums[r] = fma(to_float(dot), mul(Lanes::all(own), scale), sums[r]);
        if constexpr (T::MINIMA) {
          Lanes minimum = Lanes::load(scales + 16 * (T::GROUPS + s));
          sums[r] = fma(minimum, Lanes::all(own * float(x.sums[group])), sums[r]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float parts[16];
    sums[r].store(parts);
    for (int64_t c = 0; c < count; ++c) y[r * ldy + c] = bias ? parts[c] + bias[c] : parts[c];
  }
}

template <typename T>
void quantize_rows(Pool& pool, const float* x, int64_t M, int64_t K, Activations& a) {
  a.records = (K + T::K - 1) / T::K;
  a.q.resize(size_t(M * a.records * T::K));
  a.scales.resize(size_t(M * a.records));
  a.sums.resize(size_t(M * a.records * T::GROUPS));
  pool.run((M + 15) / 16, [&](int64_t task) {
    for (int64_t m = task * 16; m < M && m < task * 16 + 16; ++m)
      quantize_row<T>(x + m * K, K, a.records, a.q.data() + m * a.records * T::K, a.scales.data() + m * a.records,
                      a.sums.data() + m * a.records * T::GROUPS);
  });
}

template <typename T>
void quantized_linear(Pool& pool, const Activations& a, const uint8_t* data, const float* bias, float* y, int64_t ldy,
                      int64_t M, int64_t N) {
  for_ranges(pool, M <= 8, N, 64, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += 16) {
      const uint8_t* panel = data + n / 16 * a.records * T::RECORD;
      int64_t count = N - n < 16 ? N - n : 16, m = 0;
      const float* added = bias ? bias + n : nullptr;
      for (; m + 8 <= M; m += 8) panel_tile<T, 8>(a, m, panel, added, y + m * ldy + n, ldy, count);
      for (; m + 4 <= M; m += 4) panel_tile<T, 4>(a, m, panel, added, y + m * ldy + n, ldy, count);
      for (; m + 2 <= M; m += 2) panel_tile<T, 2>(a, m, panel, added, y + m * ldy + n, ldy, count);
      for (; m < M; ++m) panel_tile<T, 1>(a, m, panel, added, y + m * ldy + n, ldy, count);
    }
  });
}

// From q: [N, K] bytes, scales and minima: [N, K / inputs of a scale], to panels. Missing outputs and inputs weigh zero.
template <typename T>
void pack(const uint8_t* q, const typename T::S* scales, const typename T::S* minima, uint8_t* out, int64_t N, int64_t K) {
  int64_t records = (K + T::K - 1) / T::K, groups = records * T::GROUPS;
  std::memset(out, 0, size_t((N + 15) / 16 * records * T::RECORD));
  for (int64_t n = 0; n < (N + 15) / 16 * 16; ++n)
    for (int64_t g = 0; g < records; ++g) {
      uint8_t* record = out + (n / 16 * records + g) * T::RECORD;
      typename T::S* s = reinterpret_cast<typename T::S*>(record);
      int64_t lane = n % 16;
      for (int i = 0; n < N && i < T::GROUPS; ++i) {
        s[16 * i + lane] = scales[n * groups + g * T::GROUPS + i];
        if (T::MINIMA) s[16 * (T::GROUPS + i) + lane] = minima[n * groups + g * T::GROUPS + i];
      }
      uint8_t* bytes = record + T::SCALES * (T::MINIMA ? 2 : 1);
      for (int64_t k = 0; k < T::K; ++k) {
        uint8_t value = n < N && g * T::K + k < K ? q[n * K + g * T::K + k] : uint8_t(T::ZERO);
        int64_t step = k / 4, at = 4 * lane + k % 4, planes = T::STEPS / 2;
        if (T::BITS == 8) {
          bytes[64 * step + at] = value;
          continue;
        }
        bytes[64 * (step % planes) + at] |= uint8_t((value & 15) << (step < planes ? 0 : 4));
        if (T::BITS == 5) bytes[T::LOW + at] |= uint8_t((value >> 4 & 1) << step);
        if (T::BITS == 6) bytes[T::LOW + 64 * (step / 4) + at] |= uint8_t((value >> 4 & 3) << 2 * (step % 4));
      }
    }
}

inline float widened(float x) { return x; }
inline float widened(Half x) {
  Half row[16] = {x};
  float wide[16];
  Lanes::load(row).store(wide);
  return wide[0];
}

// One output's weights as float32: a row of an embedding table.
template <typename T>
void unpack_row(const uint8_t* data, int64_t n, float* y, int64_t K) {
  int64_t records = (K + T::K - 1) / T::K, lane = n % 16, planes = T::STEPS / 2;
  for (int64_t k = 0; k < K; ++k) {
    const uint8_t* record = data + (n / 16 * records + k / T::K) * T::RECORD;
    const typename T::S* s = reinterpret_cast<const typename T::S*>(record);
    const uint8_t* bytes = record + T::SCALES * (T::MINIMA ? 2 : 1);
    int64_t step = k % T::K / 4, at = 4 * lane + k % 4, group = step / T::GROUP_STEPS;
    int value = T::BITS == 8 ? bytes[64 * step + at] : bytes[64 * (step % planes) + at] >> (step < planes ? 0 : 4) & 15;
    if (T::BITS == 5) value |= (bytes[T::LOW + at] >> step & 1) << 4;
    if (T::BITS == 6) value |= (bytes[T::LOW + 64 * (step / 4) + at] >> 2 * (step % 4) & 3) << 4;
    float product = widened(s[16 * group + lane]) * float(value - T::ZERO);
    y[k] = T::MINIMA ? product + widened(s[16 * (T::GROUPS + group) + lane]) : product;
  }
}

}  // namespace gnomon
