// What merging models needs beside torch: task vectors of a block measured, drawn and combined in one pass that stays in
// the cache. Elementwise float32 without contraction, so every result has the bits of the same expression in torch; sums
// are float64 in an order that the element's place alone fixes. Legend: n elements of a block, "part" one model's share.
#include "lanes.h"

namespace gnomon {
namespace {

constexpr int64_t CHUNK = 1024;  // elements of one pass; one float64 sum each
constexpr int64_t LANES = 16;

enum Kind : int64_t { F32 = 0, BF16 = 1, F16 = 2 };

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

}  // namespace

// Python's ctypes mirrors these.
struct MergeInput {
  const void* data;
  int64_t kind;
};

// One model's task vector: kept where its magnitude is above `threshold`, or equal to it up to element `last`; not where
// the same holds for the outliers' cut; not where a bit of `drawn` is 0; times scale; times weight.
struct MergePart {
  MergeInput model;
  float weight, scale, threshold, outlier_threshold;
  int64_t last, outlier_last;
  const uint8_t* drawn;
  int64_t has_cut, has_outliers, has_scale;
};

namespace {

const float* widen(const MergeInput& input, int64_t at, int64_t n, float* room) {
  if (input.kind == F32) return static_cast<const float*>(input.data) + at;
  if (input.kind == BF16) {
    const uint16_t* from = static_cast<const uint16_t*>(input.data) + at;
    uint32_t wide[CHUNK];
    for (int64_t i = 0; i < n; ++i) wide[i] = uint32_t(from[i]) << 16;
    std::memcpy(room, wide, size_t(n) * 4);
    return room;
  }
  const Half* from = static_cast<const Half*>(input.data) + at;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) Lanes::load(from + i).store(room + i);
  if (i < n) {
    Half rest[LANES] = {};
    float wide[LANES];
    std::memcpy(rest, from + i, size_t(n - i) * sizeof(Half));
    Lanes::load(rest).store(wide);
    std::memcpy(room + i, wide, size_t(n - i) * 4);
  }
  return room;
}

// Rounded to nearest, ties to even; any NaN becomes the quiet one, as torch has it.
void narrow(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = float_to_bits(from[i]);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// model - base (or the model itself without a base) of elements [at, at + n).
void difference(const MergeInput* base, const MergeInput& model, int64_t at, int64_t n, float* delta) {
  alignas(64) float room_a[CHUNK], room_b[CHUNK];
  const float* a = widen(model, at, n, room_a);
  if (!base) {
    std::memcpy(delta, a, size_t(n) * 4);
    return;
  }
  const float* b = widen(*base, at, n, room_b);
  for (int64_t i = 0; i < n; ++i) delta[i] = a[i] - b[i];
}

// The float64 sum of up to CHUNK numbers: sixteen lanes down the rows, then halves of the lanes onto each other.
double chunk_sum(const float* x, int64_t n) {
  double lane[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t l = 0; l < LANES; ++l) lane[l] += double(x[i + l]);
  for (int64_t l = 0; i + l < n; ++l) lane[l] += double(x[i + l]);
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

struct Philox {  // Philox4x64-10, as NumPy numbers it: the first block of a lane has counter 1
  uint64_t key0, key1;
  void block(uint64_t step, uint64_t lane, uint64_t* out) const {
    uint64_t c0 = step + 1, c1 = lane + (step + 1 == 0), c2 = 0, c3 = 0, k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      unsigned __int128 first = (unsigned __int128)0xD2E7470EE14C6C93ull * c0;
      unsigned __int128 second = (unsigned __int128)0xCA5A826395121157ull * c2;
      uint64_t n0 = uint64_t(second >> 64) ^ c1 ^ k0, n2 = uint64_t(first >> 64) ^ c3 ^ k1;
      c1 = uint64_t(second), c3 = uint64_t(first), c0 = n0, c2 = n2;
      k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
};

// Whether elements start .. start + n of a tensor are kept: each has 16 bits of lane 0, and where those are just the
// first half of `below`, 16 more of lane 1.
void draw(const Philox& source, int64_t start, int64_t n, uint64_t below, uint8_t* keep) {
  if (below >> 32) {
    std::memset(keep, 1, size_t(n));
    return;
  }
  alignas(64) uint64_t room[CHUNK / 4 + 8];
  int64_t step = start / 16, skip = start % 16;
  for (int64_t at = 0; at < skip + n; at += 16, ++step) source.block(uint64_t(step), 0, room + at / 4);
  uint16_t halves[CHUNK], high = uint16_t(below >> 16), low = uint16_t(below), equal = 0;
  std::memcpy(halves, reinterpret_cast<const char*>(room) + 2 * skip, size_t(n) * 2);
  for (int64_t i = 0; i < n; ++i) keep[i] = halves[i] < high, equal |= halves[i] == high;
  if (!equal) return;
  for (int64_t i = 0; i < n; ++i) {
    if (halves[i] != high) continue;
    uint64_t more[4];
    source.block(uint64_t(start + i), 1, more);
    keep[i] = uint16_t(more[0]) < low;
  }
}

struct Octets {  // eight bits as eight factors
  float of[256][8];
  Octets() {
    for (int byte = 0; byte < 256; ++byte)
      for (int bit = 0; bit < 8; ++bit) of[byte][bit] = float(byte >> bit & 1);
  }
};
const Octets octets;

void cut(const float* magnitude, int64_t n, float threshold, int64_t last, float* keep) {
  int32_t up_to = int32_t(last < 0 ? -1 : last < n ? last : n);
  for (int32_t i = 0; i < int32_t(n); ++i)
    keep[i] = (magnitude[i] > threshold) | ((magnitude[i] == threshold) & (i <= up_to)) ? 1.0f : 0.0f;
}

// A part's weighted task vector of elements [at, at + n).
void weighted(const MergeInput& base, const MergePart& part, int64_t at, int64_t n, float* out) {
  alignas(64) float magnitude[CHUNK], keep[CHUNK], drop[CHUNK];
  difference(&base, part.model, at, n, out);
  if (part.has_cut) {
    for (int64_t i = 0; i < n; ++i) magnitude[i] = __builtin_fabsf(out[i]);
    cut(magnitude, n, part.threshold, part.last - at, keep);
    if (part.has_outliers) {
      cut(magnitude, n, part.outlier_threshold, part.outlier_last - at, drop);
      for (int64_t i = 0; i < n; ++i) keep[i] = keep[i] * (1.0f - drop[i]);
    }
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * keep[i];
  }
  if (part.drawn) {
    const uint8_t* bits = part.drawn + at / 8;  // chunks begin at whole bytes
    for (int64_t i = 0; i < n; i += 8) std::memcpy(keep + i, octets.of[bits[i / 8]], 32);
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * keep[i];
  }
  if (part.has_scale)
    for (int64_t i = 0; i < n; ++i) out[i] = out[i] * part.scale;
  for (int64_t i = 0; i < n; ++i) out[i] = out[i] * part.weight;
}

}  // namespace
}  // namespace gnomon

using namespace gnomon;

extern "C" {

// Whether all n elements are finite.
int gnomon_merge_finite(const MergeInput* input, int64_t n) {
  uint32_t bad = 0;
  if (input->kind == F32) {
    const float* x = static_cast<const float*>(input->data);
    for (int64_t i = 0; i < n; ++i) bad |= uint32_t((float_to_bits(x[i]) & 0x7f800000) == 0x7f800000);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(input->data);
    uint16_t mask = input->kind == BF16 ? 0x7f80 : 0x7c00;
    for (int64_t i = 0; i < n; ++i) bad |= uint32_t((x[i] & mask) == mask);
  }
  return !bad;
}

// Every stride-th magnitude |model - base|.
void gnomon_merge_sample(const MergeInput* base, const MergeInput* model, int64_t n, int64_t stride, float* out) {
  float delta;
  for (int64_t i = 0; i < n; i += stride) {
    difference(base, *model, i, 1, &delta);
    *out++ = __builtin_fabsf(delta);
  }
}

// counts: magnitudes > high, > low, == low. inside (room for n + 1): those strictly between. Returns how many those are.
int64_t gnomon_merge_count(const MergeInput* base, const MergeInput* model, int64_t n, float low, float high,
                           int64_t* counts, float* inside) {
  alignas(64) float x[CHUNK];
  int64_t found = 0;
  counts[0] = counts[1] = counts[2] = 0;
  for (int64_t at = 0; at < n; at += CHUNK) {
    int64_t size = at + CHUNK < n ? CHUNK : n - at;
    difference(base, *model, at, size, x);
    int32_t above = 0, above_low = 0, at_low = 0;
    for (int64_t i = 0; i < size; ++i) {
      x[i] = __builtin_fabsf(x[i]);
      above += x[i] > high, above_low += x[i] > low, at_low += x[i] == low;
    }
    counts[0] += above, counts[1] += above_low, counts[2] += at_low;
    for (int64_t i = 0; i < size; ++i) {
      inside[found] = x[i];
      found += (x[i] > low) & (x[i] < high);
    }
  }
  return found;
}

// The place of the nth (from 1) magnitude equal to threshold; minus their number when there are fewer.
int64_t gnomon_merge_equal(const MergeInput* base, const MergeInput* model, int64_t n, float threshold, int64_t nth) {
  alignas(64) float x[CHUNK];
  int64_t seen = 0;
  for (int64_t at = 0; at < n; at += CHUNK) {
    int64_t size = at + CHUNK < n ? CHUNK : n - at;
    difference(base, *model, at, size, x);
    int32_t here = 0;
    for (int64_t i = 0; i < size; ++i) here += __builtin_fabsf(x[i]) == threshold;
    if (nth > 0 && seen + here >= nth)
      for (int64_t i = 0; i < size; ++i)
        if (__builtin_fabsf(x[i]) == threshold && ++seen == nth) return at + i;
    seen += here;
  }
  return -seen;
}

// bits: one per element, set where its draw (of a tensor's element start + i) is below `below` / 2^32; sums (2 a chunk): of the
// magnitudes before and after dropping the others.
void gnomon_merge_drop(const MergeInput* base, const MergeInput* model, int64_t n, const uint64_t* key, int64_t start,
                       uint64_t below, uint8_t* bits, double* sums) {
  alignas(64) float x[CHUNK];
  Philox source{key[0], key[1]};
  for (int64_t at = 0; at < n; at += CHUNK) {
    int64_t size = at + CHUNK < n ? CHUNK : n - at;
    difference(base, *model, at, size, x);
    for (int64_t i = 0; i < size; ++i) x[i] = __builtin_fabsf(x[i]);
    *sums++ = chunk_sum(x, size);
    uint8_t keep[CHUNK] = {};
    draw(source, start + at, size, below, keep);
    for (int64_t i = 0; i < size; ++i) x[i] = x[i] * float(keep[i]);
    *sums++ = chunk_sum(x, size);
    for (int64_t i = 0; i < size; i += 8) {  // eight bytes of 0 or 1 gathered into one of bits, the first the lowest
      uint64_t eight;
      std::memcpy(&eight, keep + i, 8);
      bits[(at + i) / 8] = uint8_t((eight * 0x0102040810204080ull) >> 56);
    }
  }
}

// Sums of a block's products of each pair (i <= j) of `count` vectors, by chunk: sums[pair][chunk].
void gnomon_merge_gram(const MergeInput* base, const MergeInput* vectors, int64_t count, int64_t n, double* sums) {
  alignas(64) float x[16][CHUNK], product[CHUNK];
  int64_t chunks = (n + CHUNK - 1) / CHUNK;
  for (int64_t at = 0, chunk = 0; at < n; at += CHUNK, ++chunk) {
    int64_t size = at + CHUNK < n ? CHUNK : n - at, pair = 0;
    for (int64_t v = 0; v < count; ++v) difference(base, vectors[v], at, size, x[v]);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = i; j < count; ++j, ++pair) {
        for (int64_t k = 0; k < size; ++k) product[k] = x[i][k] * x[j][k];
        sums[pair * chunks + chunk] = chunk_sum(product, size);
      }
  }
}

// One float64 sum for each CHUNK of x.
void gnomon_merge_sums(const float* x, int64_t n, double* sums) {
  for (int64_t at = 0; at < n; at += CHUNK) *sums++ = chunk_sum(x + at, at + CHUNK < n ? CHUNK : n - at);
}

// base + lambda * (sum of the weighted parts [/ divisor]). elect: only what agrees with the sign of the sum (0 is +).
// normalize: divide by the weights that took part (elect), or by `divisor`. out_kind: F32 or BF16.
void gnomon_merge_combine(const MergeInput* base, const MergePart* parts, int64_t count, int64_t n, int elect,
                          int normalize, float divisor, float lambda, int has_lambda, void* out, int64_t out_kind) {
  alignas(64) float part[16][CHUNK], total[CHUNK], merged[CHUNK], shares[CHUNK], room[CHUNK];
  for (int64_t at = 0; at < n; at += CHUNK) {
    int64_t size = at + CHUNK < n ? CHUNK : n - at;
    for (int64_t p = 0; p < count; ++p) weighted(*base, parts[p], at, size, part[p]);
    std::memcpy(total, part[0], size_t(size) * 4);
    for (int64_t p = 1; p < count; ++p)
      for (int64_t i = 0; i < size; ++i) total[i] = total[i] + part[p][i];
    if (elect) {
      for (int64_t p = 0; p < count; ++p) {
        float weight = parts[p].weight;
        for (int64_t i = 0; i < size; ++i) {
          float value = part[p][i];
          float agrees = ((total[i] >= 0.0f) & (value > 0.0f)) | (!(total[i] >= 0.0f) & (value < 0.0f)) ? 1.0f : 0.0f;
          float kept = value * agrees, share = agrees * weight;
          merged[i] = p ? merged[i] + kept : kept;
          shares[i] = p ? shares[i] + share : share;
        }
      }
      if (normalize)
        for (int64_t i = 0; i < size; ++i)
          merged[i] = merged[i] / (__builtin_fabsf(shares[i]) < 1e-8f ? 1.0f : shares[i]);
    } else {
      for (int64_t i = 0; i < size; ++i) merged[i] = normalize ? total[i] / divisor : total[i];
    }
    if (has_lambda)
      for (int64_t i = 0; i < size; ++i) merged[i] = merged[i] * lambda;
    const float* b = widen(*base, at, size, room);
    float* to = out_kind == F32 ? static_cast<float*>(out) + at : total;
    for (int64_t i = 0; i < size; ++i) to[i] = b[i] + merged[i];
    if (out_kind == BF16) narrow(total, size, static_cast<uint16_t*>(out) + at);
  }
}

}  // extern "C"
