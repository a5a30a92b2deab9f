// A run of decoder layers in one call: the operators of kernels.cpp in the order of gnomon/arch/decoder.py.
//
// The same functions do the same work there one by one, so the bits are equal; here nothing crosses into Python between
// them. Python's ctypes mirrors the two structures.
#pragma once

#include "attention.h"
#include "rows.h"
#include "side.h"

namespace gnomon {

struct Layer {
  const float *query_norm, *key_norm;                // [D] or null
  const float *post_attention_norm, *post_mlp_norm;  // [C] or null
  const float *mlp_norm, *following_norm;            // [C]; the next layer's first norm, or the final one
  Weight query_key_value[3], attention_out, gate_up[2], down;
  int64_t query_key_value_parts, gate_up_parts;
  int64_t window, rotary;  // rotary: which of the step's tables
};

struct Step {
  int64_t T, C, H, G, D, F, P, R;  // R: half the rotated channels
  float eps, scale, softcap;
  int32_t gelu;
  const float* cos[4];  // [T, R] per rotary table
  const float* sin[4];
  const int32_t *tables, *sequence_of;
  const int64_t *positions, *slots;
};

// normed, residual: [T, C], in place. keys, values: per layer. groups: rows that patches run beside.
// False: a weight of an unknown kind.
inline bool run_layers(Pool& pool, const Layer* layers, int64_t count, const Step& s, float* const* keys,
                       float* const* values, float* normed, float* residual, const SideRows* groups, int64_t grouped) {
  const int64_t width = (s.H + 2 * s.G) * s.D;
  static thread_local std::vector<float> joined, queries, mixed, fed, gates, gated;
  joined.resize(size_t(s.T * width)), queries.resize(size_t(s.T * s.H * s.D)), mixed.resize(size_t(s.T * s.H * s.D));
  fed.resize(size_t(s.T * s.C)), gates.resize(size_t(s.T * 2 * s.F)), gated.resize(size_t(s.T * s.F));
  float *joined_at = joined.data(), *queries_at = queries.data(), *fed_at = fed.data();
  float *gates_at = gates.data(), *gated_at = gated.data();
  for (int64_t i = 0; i < count; ++i) {
    const Layer& l = layers[i];
    const float *cos = s.cos[l.rotary], *sin = s.sin[l.rotary];
    if (!linear(pool, normed, l.query_key_value, l.query_key_value_parts, joined_at, width, s.T)) return false;
    add_sides(pool, groups, grouped, i, 0, 3, normed, s.C, joined_at, width);
    for_rows(pool, s.T, [&](int64_t t) {
      int64_t page = s.slots[t] / PAGE, offset = s.slots[t] % PAGE;
      for (int64_t h = 0; h < s.H + 2 * s.G; ++h) {
        float* from = joined_at + t * width + h * s.D;
        int64_t group = h < s.H ? 0 : (h - s.H) % s.G, slot = ((page * s.G + group) * PAGE + offset) * s.D;
        if (h >= s.H + s.G) {
          std::memcpy(values[i] + slot, from, size_t(s.D) * sizeof(float));
          continue;
        }
        const float* norm = h < s.H ? l.query_norm : l.key_norm;
        if (norm) normalise(from, norm, from, s.D, s.eps);
        rotate(from, cos + t * s.R, sin + t * s.R, h < s.H ? queries_at + (t * s.H + h) * s.D : keys[i] + slot, s.R, s.D);
      }
    });
    AttentionShape shape{s.H, s.G, s.D, s.P, s.scale, l.window, s.softcap};
    attention(pool, shape, queries_at, keys[i], values[i], s.tables, s.sequence_of, s.positions, mixed.data(), s.T);
    if (!linear(pool, mixed.data(), &l.attention_out, 1, fed_at, s.C, s.T)) return false;
    add_sides(pool, groups, grouped, i, 3, 1, mixed.data(), s.H * s.D, fed_at, s.C);
    for_rows(pool, s.T, [&](int64_t t) {
      float *own = fed_at + t * s.C, *kept = residual + t * s.C;
      if (l.post_attention_norm) normalise(own, l.post_attention_norm, own, s.C, s.eps);
      add_normalise(own, kept, l.mlp_norm, normed + t * s.C, kept, s.C, s.eps);
    });
    if (!linear(pool, normed, l.gate_up, l.gate_up_parts, gates_at, 2 * s.F, s.T)) return false;
    add_sides(pool, groups, grouped, i, 4, 2, normed, s.C, gates_at, 2 * s.F);
    for_rows(pool, s.T, [&](int64_t t) {
      if (s.gelu) gelu_mul(gates_at + t * 2 * s.F, gated_at + t * s.F, s.F);
      else silu_mul(gates_at + t * 2 * s.F, gated_at + t * s.F, s.F);
    });
    if (!linear(pool, gated_at, &l.down, 1, fed_at, s.C, s.T)) return false;
    add_sides(pool, groups, grouped, i, 6, 1, gated_at, s.F, fed_at, s.C);
    for_rows(pool, s.T, [&](int64_t t) {
      float *own = fed_at + t * s.C, *kept = residual + t * s.C;
      if (l.post_mlp_norm) normalise(own, l.post_mlp_norm, own, s.C, s.eps);
      add_normalise(own, kept, l.following_norm, normed + t * s.C, kept, s.C, s.eps);
    });
  }
  return true;
}

}  // namespace gnomon
