// The kernels once more, with one defect chosen at run time: test-only, to see that each is found.
//
// Every defect is one that engines really have: other arithmetic for other numbers of rows, threads or neighbours. The
// sound headers are included first; then the names that decoder.h and kernels.cpp call are led through the versions here.
#include <algorithm>

#include "attention.h"
#include "rows.h"

namespace gnomon {

enum Defect {
  NONE,
  SPLIT_SUMS_FROM_EIGHT_ROWS,  // split-K where the batch is large
  OWN_PATH_FOR_ONE_ROW,        // a gemv with two sets of sums
  TAIL_ROWS_ONE_BY_ONE,        // rows that fill no tile are summed in order
  UNFUSED_IN_TILES,            // multiply, round, add: contraction that follows the tile
  COLUMNS_BY_THREADS,          // chunks of outputs cut by the number of threads, their last column summed in order
  OTHER_TREE_FOR_PAIRS,        // the horizontal sum of two rows at once
  ONE_SCALE_FOR_THE_BATCH,     // activations rounded by the batch's greatest value
  PAIRS_THAT_SATURATE,         // byte products added in sixteen bits, from eight rows on
  KEYS_SPLIT_BY_LOAD,          // attention in two parts where rows are few
  BLOCKS_FROM_THE_CHUNK,       // key blocks counted from the chunk's first token
  STALE_KEYS_TIMES_ZERO,       // what lies behind the last key is multiplied by zero instead of left alone
  GATE_WITH_A_TAIL,            // the last elements of a small buffer by the C library's exp
  NORM_BY_ROWS,                // another association from sixteen rows on
  THE_CALLERS_ROUNDING,        // denormals flushed when the caller's thread does
};
int defect = NONE;
int64_t rows_now = 0;

struct LooseMode {
#if defined(__x86_64__)
  unsigned saved = _mm_getcsr();
  LooseMode() {
    if (defect != THE_CALLERS_ROUNDING) _mm_setcsr(0x1f80);
  }
  ~LooseMode() { _mm_setcsr(saved); }
#endif
};

inline float in_order(const float* x, const float* w, int64_t K) {
  float sum = 0.0f;
  for (int64_t k = 0; k < K; ++k) sum = fma1(w[k], x[k], sum);
  return sum;
}

inline float two_sets(const float* x, const float* w, int64_t K) {
  float even[16] = {}, odd[16] = {}, sum = 0.0f;
  for (int64_t k = 0; k < K; ++k) {
    float& lane = (k / 16 % 2 ? odd : even)[k % 16];
    lane = fma1(w[k], x[k], lane);
  }
  for (int l = 0; l < 16; ++l) sum = sum + (even[l] + odd[l]);
  return sum;
}

inline float unfused(const float* x, const float* w, int64_t K) {
  float lanes[16] = {};
  for (int64_t k = 0; k < K; ++k) lanes[k % 16] = lanes[k % 16] + w[k] * x[k];
  return tree(Lanes::load(lanes));
}

inline float other_tree(const float* x, const float* w, int64_t K) {
  float lanes[16] = {}, sum = 0.0f;
  for (int64_t k = 0; k < K; ++k) lanes[k % 16] = fma1(w[k], x[k], lanes[k % 16]);
  for (float lane : lanes) sum = sum + lane;
  return sum;
}

inline void spoil_dense(int threads, const float* x, const Weight& weight, float* y, int64_t ldy, int64_t M) {
  const int64_t K = weight.k, N = weight.n, chunk = (N + threads - 1) / threads;
  std::vector<float> row(static_cast<size_t>(K));
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      uint32_t bits = weight.kind == 1 ? uint32_t(static_cast<const uint16_t*>(weight.data)[n * K + k]) << 16 : 0;
      std::memcpy(&row[size_t(k)], &bits, 4);
      if (weight.kind == 0) row[size_t(k)] = static_cast<const float*>(weight.data)[n * K + k];
    }
    for (int64_t m = 0; m < M; ++m) {
      const float *from = x + m * K, *w = row.data();
      float value;
      if (defect == SPLIT_SUMS_FROM_EIGHT_ROWS && M >= 8)
        value = dot16(from, w, K / 2) + dot16(from + K / 2, w + K / 2, K - K / 2);
      else if (defect == OWN_PATH_FOR_ONE_ROW && M == 1) value = two_sets(from, w, K);
      else if (defect == TAIL_ROWS_ONE_BY_ONE && m >= M / 4 * 4) value = in_order(from, w, K);
      else if (defect == UNFUSED_IN_TILES && M >= 2) value = unfused(from, w, K);
      else if (defect == COLUMNS_BY_THREADS && (n + 1) % chunk == 0) value = in_order(from, w, K);
      else if (defect == OTHER_TREE_FOR_PAIRS && m < M / 2 * 2) value = other_tree(from, w, K);
      else continue;
      y[m * ldy + n] = weight.bias ? value + weight.bias[n] : value;
    }
  }
}

inline int32_t saturated(int32_t pair) { return std::min(32767, std::max(-32768, pair)); }

inline void spoil_int8(Pool& pool, const float* x, const Weight& weight, float* y, int64_t ldy, int64_t M) {
  using T = Kind<8, 64, 1, float, false, 128>;
  Activations a;
  quantize_rows<T>(pool, x, M, weight.k, a);
  const uint8_t* data = static_cast<const uint8_t*>(weight.data);
  if (defect == ONE_SCALE_FOR_THE_BATCH) {
    float top = *std::max_element(a.scales.begin(), a.scales.end());
    for (size_t g = 0; g < a.scales.size() && top > 0; ++g) {
      a.sums[g] = 0;
      for (size_t i = g * T::K; i < (g + 1) * T::K; ++i) {
        a.q[i] = int8_t(__builtin_rintf(float(a.q[i]) * a.scales[g] / top));
        a.sums[g] += a.q[i];
      }
      a.scales[g] = top;
    }
    quantized_linear<T>(pool, a, data, weight.bias, y, ldy, M, weight.n);
  } else if (defect == PAIRS_THAT_SATURATE && M >= 8) {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < weight.n; ++n) {
        float sum = 0.0f;
        for (int64_t g = 0; g < a.records; ++g) {
          const uint8_t* record = data + (n / 16 * a.records + g) * T::RECORD;
          const int8_t* q = a.q.data() + (m * a.records + g) * T::K;
          int32_t dot = -128 * a.sums[size_t(m * a.records + g)];
          for (int64_t k = 0; k < T::K; k += 2) {
            const uint8_t* w = record + T::SCALES + 64 * (k / 4) + 4 * (n % 16) + k % 4;
            dot += saturated(w[0] * q[k] + w[1] * q[k + 1]);
          }
          float scale = reinterpret_cast<const float*>(record)[n % 16];
          sum = fma1(float(dot), a.scales[size_t(m * a.records + g)] * scale, sum);
        }
        y[m * ldy + n] = weight.bias ? sum + weight.bias[n] : sum;
      }
  }
}

inline bool led_linear(Pool& pool, const float* x, const Weight* weights, int64_t count, float* y, int64_t ldy, int64_t M) {
  rows_now = M;
  if (!linear(pool, x, weights, count, y, ldy, M)) return false;
  for (int64_t i = 0; i < count; y += weights[i++].n) {
    if (weights[i].kind < 2) spoil_dense(pool.threads(), x, weights[i], y, ldy, M);
    else if (weights[i].kind == 2) spoil_int8(pool, x, weights[i], y, ldy, M);
  }
  return true;
}

// Keys first..last in parts that begin at the given places, each with a maximum and a sum of its own.
inline void attend_in_parts(const AttentionShape& s, const float* q, const float* keys, const float* values,
                            const int32_t* table, int64_t group, int64_t first, int64_t last,
                            const std::vector<int64_t>& begins, float* out) {
  auto at = [&](const float* all, int64_t j) {
    return all + ((table[j / PAGE] * s.G + group) * PAGE + j % PAGE) * s.D;
  };
  float top = -__builtin_inff(), total = 0.0f;
  for (int64_t d = 0; d < s.D; ++d) out[d] = 0.0f;
  for (size_t part = 0; part < begins.size(); ++part) {
    int64_t end = part + 1 < begins.size() ? begins[part + 1] - 1 : last;
    for (int64_t j = std::max(begins[part], first); j <= end; ++j) {
      float score = dot16(q, at(keys, j), s.D) * s.scale;
      float more = score > top ? score : top, kept = exp1(top - more), weight = exp1(score - more);
      total = total * kept + weight, top = more;
      for (int64_t d = 0; d < s.D; ++d) out[d] = fma1(weight, at(values, j)[d], out[d] * kept);
    }
  }
  for (int64_t d = 0; d < s.D; ++d) out[d] = out[d] / total;
}

inline void led_attention(Pool& pool, const AttentionShape& s, const float* q, const float* keys, const float* values,
                          const int32_t* tables, const int32_t* sequence_of, const int64_t* positions, float* out,
                          int64_t T) {
  attention(pool, s, q, keys, values, tables, sequence_of, positions, out, T);
  int64_t chunk = 0;
  for (int64_t t = 0; t < T; ++t) {
    if (t == 0 || sequence_of[t] != sequence_of[t - 1]) chunk = positions[t];
    const int32_t* table = tables + sequence_of[t] * s.P;
    int64_t last = positions[t], first = s.window > 0 ? std::max<int64_t>(0, last - s.window + 1) : 0;
    for (int64_t h = 0; h < s.H; ++h) {
      int64_t group = h / (s.H / s.G), place = (t * s.H + h) * s.D;
      if (defect == KEYS_SPLIT_BY_LOAD && T < 4)
        attend_in_parts(s, q + place, keys, values, table, group, first, last, {first, (first + last) / 2}, out + place);
      if (defect == BLOCKS_FROM_THE_CHUNK && chunk % PAGE)
        attend_in_parts(s, q + place, keys, values, table, group, first, last, {first, chunk}, out + place);
      if (defect == STALE_KEYS_TIMES_ZERO && last % PAGE != PAGE - 1) {
        const float* stale = values + ((table[last / PAGE] * s.G + group) * PAGE + last % PAGE + 1) * s.D;
        for (int64_t d = 0; d < s.D; ++d) out[place + d] = out[place + d] + 0.0f * stale[d];
      }
    }
  }
}

inline void led_silu_mul(const float* x, float* y, int64_t F) {
  silu_mul(x, y, F);
  for (int64_t f = F - 5; defect == GATE_WITH_A_TAIL && rows_now < 3 && f < F; ++f)
    y[f] = float(double(x[f]) / (1.0 + std::exp(-double(x[f])))) * x[F + f];
}

inline void led_add_normalise(const float* x, const float* residual, const float* weight, float* y, float* total,
                              int64_t K, float eps) {
  add_normalise(x, residual, weight, y, total, K, eps);
  if (defect != NORM_BY_ROWS || rows_now < 16) return;
  float scale = 1.0f / __builtin_sqrtf(dot16(total, total, K) / float(K) + eps);
  for (int64_t k = 0; k < K; ++k) y[k] = total[k] * (scale * weight[k]);
}

}  // namespace gnomon

extern "C" void gnomon_inject(int number) { gnomon::defect = number; }

#define linear led_linear
#define attention led_attention
#define silu_mul led_silu_mul
#define add_normalise led_add_normalise
#define CanonicalMode LooseMode
#include "kernels.cpp"
