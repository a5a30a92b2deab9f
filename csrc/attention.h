// Causal attention over pages: absolute blocks of PAGE keys, exact maximum, blocks added in order.
#pragma once

#include "linear.h"

namespace gnomon {

constexpr int64_t PAGE = 64;

// What a call's rows have in common. Shapes: H query heads, G key-value heads, D head size, P pages of a table.
struct AttentionShape {
  int64_t H, G, D, P;
  float scale;
  int64_t window;  // <= 0: none
  float softcap;   // <= 0: none
};

inline void score(float* row, int64_t padding, int64_t used, int64_t length, float scale, float softcap, float& top) {
  for (int64_t j = 0; j < length; ++j) row[j] = row[j] * scale;
  if (softcap > 0)
    for (int64_t j = 0; j < length; ++j) row[j] = softcap * tanh1(row[j] / softcap);
  for (int64_t j = 0; j < padding; ++j) row[j] = -__builtin_inff();
  for (int64_t j = used; j < length; ++j) row[j] = -__builtin_inff();
  Lanes most = Lanes::all(-__builtin_inff());
  for (int64_t j = 0; j < length; j += 16) most = larger(Lanes::load(row + j), most);
  float parts[16];
  most.store(parts);
  top = parts[0];
  for (int i = 1; i < 16; ++i) top = parts[i] > top ? parts[i] : top;
  for (int64_t j = 0; j < length; ++j) row[j] = exp1(row[j] - top);
}

// out[d] += the block's weighted values, for R heads and LANES groups of sixteen channels at once.
template <int R, int LANES>
inline void gather(const float* weights, int64_t length, const float* values, int64_t D, int64_t low, int64_t high,
                   float* out) {
  Lanes sums[R][LANES];
  for (int r = 0; r < R; ++r)
    for (int l = 0; l < LANES; ++l) sums[r][l] = Lanes::zero();
  for (int64_t j = low; j <= high; ++j) {
    Lanes value[LANES];
    for (int l = 0; l < LANES; ++l) value[l] = Lanes::load(values + j * D + 16 * l);
    for (int r = 0; r < R; ++r) {
      Lanes weight = Lanes::all(weights[r * length + j]);
      for (int l = 0; l < LANES; ++l) sums[r][l] = fma(weight, value[l], sums[r][l]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int l = 0; l < LANES; ++l) add(Lanes::load(out + r * D + 16 * l), sums[r][l]).store(out + r * D + 16 * l);
}

inline void gather_tail(const float* weights, const float* values, int64_t D, int64_t low, int64_t high, float* out,
                        int64_t count) {
  Lanes sum = Lanes::zero();
  for (int64_t j = low; j <= high; ++j) sum = fma(Lanes::all(weights[j]), load_tail(values + j * D, count), sum);
  float parts[16];
  sum.store(parts);
  for (int64_t i = 0; i < count; ++i) out[i] = out[i] + parts[i];
}

// R query heads of one token that share a key-value head, over keys first..last. q, out: [R, D].
template <int R>
void attend(const AttentionShape& s, const float* q, const float* keys, const float* values, const int32_t* table,
            int64_t group, int64_t first, int64_t last, float* out) {
  static thread_local std::vector<float> scores;
  const int64_t D = s.D, first_block = first / PAGE, blocks = last / PAGE - first_block + 1, length = blocks * PAGE;
  const int64_t begin = first - first_block * PAGE, end = last - first_block * PAGE;  // within the blocks
  if (int64_t(scores.size()) < R * length) scores.resize(size_t(R * (length + 1024)));
  auto page = [&](const float* all, int64_t b) { return all + (table[first_block + b] * s.G + group) * PAGE * D; };
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t high = end - b * PAGE < PAGE - 1 ? end - b * PAGE : PAGE - 1;
    for (int64_t j = b ? 0 : begin / 4 * 4; j <= high; j += 4)  // up to three keys too many: masked below
      tile<R, 4>(q, page(keys, b) + j * D, static_cast<const float*>(nullptr), scores.data() + b * PAGE + j, D, length);
  }
  float totals[R], top;
  for (int r = 0; r < R; ++r) score(scores.data() + r * length, begin, end + 1, length, s.scale, s.softcap, top);
  for (int r = 0; r < R; ++r) {
    totals[r] = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) totals[r] = totals[r] + sum16(scores.data() + r * length + b * PAGE, PAGE);
  }
  for (int64_t i = 0; i < R * D; ++i) out[i] = 0.0f;
  for (int64_t b = 0; b < blocks; ++b) {
    int64_t low = b ? 0 : begin, high = end - b * PAGE < PAGE - 1 ? end - b * PAGE : PAGE - 1, d = 0;
    const float* weights = scores.data() + b * PAGE;
    const float* value = page(values, b);
    for (; d + 64 <= D; d += 64) gather<R, 4>(weights, length, value + d, D, low, high, out + d);
    for (; d + 16 <= D; d += 16) gather<R, 1>(weights, length, value + d, D, low, high, out + d);
    for (int r = 0; d < D && r < R; ++r)
      gather_tail(weights + r * length, value + d, D, low, high, out + r * D + d, D - d);
  }
  for (int r = 0; r < R; ++r)
    for (int64_t d = 0; d < D; ++d) out[r * D + d] = out[r * D + d] / totals[r];
}

// q, out: [T, H, D]; keys, values: [pages, G, PAGE, D]; tables: [S, P]; sequence_of, positions: [T].
inline void attention(Pool& pool, const AttentionShape& s, const float* q, const float* keys, const float* values,
                      const int32_t* tables, const int32_t* sequence_of, const int64_t* positions, float* out, int64_t T) {
  pool.run(T * s.G, [=](int64_t task) {
    int64_t t = task / s.G, group = task % s.G, last = positions[t], heads = s.H / s.G;
    int64_t first = s.window > 0 && last - s.window + 1 > 0 ? last - s.window + 1 : 0;
    const int32_t* table = tables + sequence_of[t] * s.P;
    for (int64_t h = 0; h < heads;) {
      int64_t at = (t * s.H + group * heads + h) * s.D;
      auto some = [&](auto attend_some) { attend_some(s, q + at, keys, values, table, group, first, last, out + at); };
      if (heads - h >= 4) some(attend<4>), h += 4;
      else if (heads - h == 3) some(attend<3>), h += 3;
      else if (heads - h == 2) some(attend<2>), h += 2;
      else some(attend<1>), h += 1;
    }
  });
}

}  // namespace gnomon
