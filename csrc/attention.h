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

inline void score(float* row, int64_t padding, int64_t used, int64_t length, float scale, float softcap) {
  for (int64_t j = 0; j < length; ++j) row[j] = row[j] * scale;
  if (softcap > 0)
    for (int64_t j = 0; j < length; ++j) row[j] = softcap * tanh1(row[j] / softcap);
  for (int64_t j = 0; j < padding; ++j) row[j] = -__builtin_inff();
  for (int64_t j = used; j < length; ++j) row[j] = -__builtin_inff();
  Lanes most = Lanes::all(-__builtin_inff());
  for (int64_t j = 0; j < length; j += 16) most = larger(Lanes::load(row + j), most);
  float parts[16];
  most.store(parts);
  float top = parts[0];
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
  float totals[R];
  for (int r = 0; r < R; ++r) score(scores.data() + r * length, begin, end + 1, length, s.scale, s.softcap);
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

// The keys of one page and group, sixteen by sixteen, with their channels first: [PAGE / 16, D to the next sixteen, 16];
// missing channels are zero.
inline void turn(const float* keys, int64_t D, float* turned) {
  const int64_t channels = (D + 15) / 16 * 16;
  for (int64_t j = 0; j < PAGE; ++j) {
    float* to = turned + j / 16 * channels * 16 + j % 16;
    for (int64_t d = 0; d < D; ++d) to[d * 16] = keys[j * D + d];
    for (int64_t d = D; d < channels; ++d) to[d * 16] = 0.0f;
  }
}

// Of the sixteen logical lanes of R queries by sixteen keys at once, the tree's node that sums lanes l, l + STEP, ...
// Sixteen keys lie side by side here, so that a node is an addition and the tree needs no shuffles; the order is dot16's.
template <int R, int STEP>
inline void node(const float* q, const float* turned, int64_t channels, int64_t l, Lanes* sums) {
  if constexpr (STEP == 16) {
    for (int r = 0; r < R; ++r) sums[r] = Lanes::zero();
    for (int64_t d = l; d < channels; d += 16) {
      Lanes key = Lanes::load(turned + d * 16);
      for (int r = 0; r < R; ++r) sums[r] = fma(key, Lanes::all(q[r * channels + d]), sums[r]);
    }
  } else {
    Lanes others[R];
    node<R, 2 * STEP>(q, turned, channels, l, sums);
    node<R, 2 * STEP>(q, turned, channels, l + STEP, others);
    for (int r = 0; r < R; ++r) sums[r] = add(sums[r], others[r]);
  }
}

template <int R>
inline void scores_of(int64_t rows, const float* q, const float* turned, int64_t channels, float* scores, int64_t length) {
  if constexpr (R > 1) {
    if (rows < R) return scores_of<R - 1>(rows, q, turned, channels, scores, length);
  }
  Lanes sums[R];
  node<R, 1>(q, turned, channels, 0, sums);
  for (int r = 0; r < R; ++r) sums[r].store(scores + r * length);
}

template <int R>
inline void gather_rows(int64_t rows, const float* weights, int64_t length, const float* values, int64_t D, int64_t low,
                        int64_t high, float* out) {
  if constexpr (R > 1) {
    if (rows < R) return gather_rows<R - 1>(rows, weights, length, values, D, low, high, out);
  }
  int64_t d = 0;
  for (; d + 64 <= D; d += 64) gather<R, 4>(weights, length, values + d, D, low, high, out + d);
  for (; d + 16 <= D; d += 16) gather<R, 1>(weights, length, values + d, D, low, high, out + d);
  for (int r = 0; d < D && r < R; ++r)
    gather_tail(weights + r * length, values + d, D, low, high, out + r * D + d, D - d);
}

// Tokens of one sequence, at consecutive positions: count of them from token t on.
struct Stretch {
  int64_t t, count;
};

constexpr int64_t SEVERAL = 8, MOST = 32, SCORES = 1 << 18;  // tokens worth turning keys for; a stretch; its scores

// The query heads of a stretch's tokens that share a key-value head: each key and value is read once for all of them.
inline void attend_together(const AttentionShape& s, const float* q, const float* keys, const float* values,
                            const int32_t* table, int64_t group, int64_t position, int64_t count, float* out) {
  static thread_local std::vector<float> queries, scores, turned, sums;
  const int64_t D = s.D, heads = s.H / s.G, rows = count * heads, channels = (D + 15) / 16 * 16;
  auto first = [&](int64_t i) { return s.window > 0 && position + i - s.window + 1 > 0 ? position + i - s.window + 1 : 0; };
  const int64_t begin = first(0) / PAGE, blocks = (position + count - 1) / PAGE - begin + 1, length = blocks * PAGE;
  queries.assign(size_t(rows * channels), 0.0f), scores.resize(size_t(rows * length));
  turned.resize(size_t(channels * PAGE)), sums.assign(size_t(rows * D), 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    std::memcpy(&queries[size_t(i * channels)], q + (i / heads * s.H + i % heads) * D, size_t(D) * sizeof(float));
  auto page = [&](const float* all, int64_t b) { return all + (table[begin + b] * s.G + group) * PAGE * D; };
  auto clamped = [&](int64_t i) { return i < 0 ? 0 : i > count ? count : i; };
  // Tokens reach a block from the one at its first key on, and leave it when the window has passed its last key.
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = (begin + b) * PAGE, left = s.window > 0 ? start + PAGE - 1 + s.window - position : count;
    turn(page(keys, b), D, turned.data());
    for (int64_t j = 0; j < PAGE; j += 16)
      for (int64_t i = clamped(start - position) * heads, end = clamped(left) * heads; i < end; i += ROWS)
        scores_of<ROWS>(end - i, &queries[size_t(i * channels)], &turned[size_t(j * channels)], channels,
                        scores.data() + i * length + b * PAGE + j, length);
  }
  std::vector<float> totals(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t last = position + i / heads, from = first(i / heads), block = from / PAGE;
    float* row = scores.data() + i * length + (block - begin) * PAGE;
    score(row, from - block * PAGE, last - block * PAGE + 1, (last / PAGE - block + 1) * PAGE, s.scale, s.softcap);
    float& total = totals[size_t(i)];
    for (int64_t b = 0; b <= last / PAGE - block; ++b) total = total + sum16(row + b * PAGE, PAGE);
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = (begin + b) * PAGE, left = s.window > 0 ? start + PAGE - 1 + s.window - position : count;
    const float *value = page(values, b), *weights = scores.data() + b * PAGE;
    // All keys of the block count from token `whole` on, up to `partly`, from which on the window cuts the first ones off.
    const int64_t enter = clamped(start - position), leave = clamped(left);
    const int64_t whole = clamped(start + PAGE - 1 - position);
    const int64_t partly = s.window > 0 ? clamped(start + s.window - position) : count;
    for (int64_t i = enter; i < leave;) {
      const int64_t end = i >= whole && i < partly ? (partly < leave ? partly : leave) : i + 1;
      const int64_t low = first(i) > start ? first(i) - start : 0;
      const int64_t high = position + i - start < PAGE - 1 ? position + i - start : PAGE - 1;
      for (int64_t row = i * heads; row < end * heads; row += ROWS)
        gather_rows<ROWS>(end * heads - row, weights + row * length, length, value, D, low, high, &sums[size_t(row * D)]);
      i = end;
    }
  }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < D; ++d)
      out[(i / heads * s.H + i % heads) * D + d] = sums[size_t(i * D + d)] / totals[size_t(i)];
}

// The batch's tokens in stretches: as many neighbours of one sequence as share keys well, or one by one.
inline std::vector<Stretch> stretches(const AttentionShape& s, const int32_t* sequence_of, const int64_t* positions,
                                      int64_t T) {
  std::vector<Stretch> found;
  for (int64_t t = 0; t < T;) {
    int64_t fitting = SCORES / (s.H / s.G * (positions[t] + MOST)), most = 1;
    fitting = fitting < SEVERAL ? SEVERAL : fitting > MOST ? MOST : fitting;
    while (t + most < T && most < fitting && sequence_of[t + most] == sequence_of[t] &&
           positions[t + most] == positions[t] + most)
      ++most;
    if (most < SEVERAL) most = 1;
    found.push_back({t, most});
    t += most;
  }
  return found;
}

// q, out: [T, H, D]; keys, values: [pages, G, PAGE, D]; tables: [S, P]; sequence_of, positions: [T].
inline void attention(Pool& pool, const AttentionShape& s, const float* q, const float* keys, const float* values,
                      const int32_t* tables, const int32_t* sequence_of, const int64_t* positions, float* out, int64_t T) {
  const std::vector<Stretch> found = stretches(s, sequence_of, positions, T);
  pool.run(int64_t(found.size()) * s.G, [&](int64_t task) {
    const Stretch& stretch = found[size_t(task / s.G)];
    int64_t t = stretch.t, group = task % s.G, last = positions[t], heads = s.H / s.G;
    const int32_t* table = tables + sequence_of[t] * s.P;
    if (stretch.count > 1) {
      int64_t at = (t * s.H + group * heads) * s.D;
      attend_together(s, q + at, keys, values, table, group, last, stretch.count, out + at);
      return;
    }
    int64_t first = s.window > 0 && last - s.window + 1 > 0 ? last - s.window + 1 : 0;
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
