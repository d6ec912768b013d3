// The attention kernels, written once on 16 virtual lanes and included by each path after lanes.inc.h and after its own
// operations (attention_avx512.inc.h and so on). Like lanes.inc.h it has internal linkage.
//
// A path's operations define: kPositionTile, kElementTile (vectors of 16 that a tile of rows holds in registers),
// vload_f16, vstore_f16, vround8 (to int8), vround16 (to int16), I (16 int32), iset1, ifloat, K (16 positions of 4 int8
// of keys), load_keys, idot4, keys_bias (what idot4 adds for each unit of the query), E (16 elements of 2 int8 of
// values), load_values, idot2, unpack512 (192 bytes
// to 512 levels).

namespace {

using halo::BlockRows;
using halo::kBlockPositions;
using halo::kRowTile;
using halo::Partial;

struct FloatForm {
  typedef float Element;
  static inline V load(const float *p) { return vload(p); }
};

struct HalfForm {
  typedef uint16_t Element;
  static inline V load(const uint16_t *p) { return vload_f16(p); }
};

inline float highest(V v) {
  float lane[16];
  vstore(lane, v);
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] = lane[l] > lane[l + half] ? lane[l] : lane[l + half];
  return lane[0];
}

inline int most_positions(const BlockRows &b) {
  int most = 0;
  for (int r = 0; r < b.rows; ++r) most = b.limits[r] > most ? b.limits[r] : most;
  return most;
}

// Bring along what lies as far into `fetched` as `at` into `start`. The hardware does not: the pieces are too short.
inline void fetch_along(const void *fetched, const void *at, const void *start) {
  if (fetched) __builtin_prefetch((const char *)fetched + ((const char *)at - (const char *)start), 0, 2);
}

// Scores of kRows rows and 16 * kTile positions. The lanes are positions, so no lane is ever added to another.
template <class Form, int kRows, int kTile>
inline void float_scores(const BlockRows &b, int position, float (*scores)[kBlockPositions]) {
  const typename Form::Element *keys = (const typename Form::Element *)b.keys + (size_t)position * b.width;
  V sum[kRows][kTile];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t) sum[r][t] = vzero();
  for (int d = 0; d < b.head_dim; ++d) {
    V k[kTile];
    for (int t = 0; t < kTile; ++t) k[t] = Form::load(keys + (size_t)t * 16 * b.width + 16 * d);
    for (int t = 0; t < kTile; ++t) fetch_along(b.fetch_with_keys, keys + (size_t)t * 16 * b.width + 16 * d, b.keys);
    for (int r = 0; r < kRows; ++r) {
      V q = vset1(b.q[(size_t)r * b.width + d]);
      for (int t = 0; t < kTile; ++t) sum[r][t] = vfma(q, k[t], sum[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t) vstore(scores[r] + position + 16 * t, sum[r][t]);
}

template <int kRows, int kTile>
inline void int_scores(const BlockRows &b, int position, const int32_t *bias, float (*scores)[kBlockPositions]) {
  const uint8_t *keys = (const uint8_t *)b.keys + (size_t)position * b.width;
  I sum[kRows][kTile];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t) sum[r][t] = iset1(bias[r]);
  for (int d = 0; d < b.width; d += 4) {
    K k[kTile];
    for (int t = 0; t < kTile; ++t) k[t] = load_keys(keys + (size_t)t * 16 * b.width + 16 * d);
    for (int t = 0; t < kTile; ++t) fetch_along(b.fetch_with_keys, keys + (size_t)t * 16 * b.width + 16 * d, b.keys);
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTile; ++t) sum[r][t] = idot4(sum[r][t], k[t], b.q8 + (size_t)r * b.width + d);
  }
  for (int t = 0; t < kTile; ++t) {
    V scale = vload(b.key_scales + position + 16 * t);
    for (int r = 0; r < kRows; ++r)
      vstore(scores[r] + position + 16 * t, vmul(vmul(ifloat(sum[r][t]), scale), vset1(b.q_scales[r])));
  }
}

// exp(score - largest) of a row's `limit` scores, zeros up to `filled`; the largest and the sum are results.
inline void softmax_row(float *scores, int limit, int filled, float *top, float *total) {
  for (int j = limit; j % 16; ++j) scores[j] = scores[0];
  V most = vload(scores);
  for (int j = 16; j < limit; j += 16) most = vmax(most, vload(scores + j));
  *top = highest(most);
  V t = vset1(*top), sum = vzero();
  for (int j = 0; j < limit; j += 16) {
    vstore(scores + j, vexp(vsub(vload(scores + j), t)));
    for (int k = limit; k < j + 16; ++k) scores[k] = 0.0f;
    sum = vadd(sum, vload(scores + j));
  }
  for (int j = (limit + 15) / 16 * 16; j < filled; j += 16) vstore(scores + j, vzero());
  *total = vsum(sum);
}

template <class Form, int kRows, int kTile>
inline void float_values(const BlockRows &b, int element, int positions, float (*weights)[kBlockPositions]) {
  const typename Form::Element *values = (const typename Form::Element *)b.values + element;
  V sum[kRows][kTile];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t) sum[r][t] = vzero();
  for (int j = 0; j < positions; ++j) {
    V v[kTile];
    for (int t = 0; t < kTile; ++t) v[t] = Form::load(values + (size_t)j * b.width + 16 * t);
    for (int t = 0; t < kTile; ++t) fetch_along(b.fetch_with_values, values + (size_t)j * b.width + 16 * t, b.values);
    for (int r = 0; r < kRows; ++r) {
      V p = vset1(weights[r][j]);
      for (int t = 0; t < kTile; ++t) sum[r][t] = vfma(p, v[t], sum[r][t]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t) vstore(b.sums + (size_t)r * b.width + element + 16 * t, sum[r][t]);
}

template <int kRows, int kTile>
inline void int_values(const BlockRows &b, int element, int positions, const int16_t (*weights)[kBlockPositions],
                       const float *scales) {
  const int8_t *values = (const int8_t *)b.values + 2 * element;
  I sum[kRows][kTile];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t) sum[r][t] = iset1(0);
  for (int j = 0; j < positions; j += 2) {
    E v[kTile];
    for (int t = 0; t < kTile; ++t) v[t] = load_values(values + (size_t)j * b.width + 32 * t);
    for (int t = 0; t < kTile; ++t) fetch_along(b.fetch_with_values, values + (size_t)j * b.width + 32 * t, b.values);
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTile; ++t) sum[r][t] = idot2(sum[r][t], v[t], weights[r] + j);
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTile; ++t)
      vstore(b.sums + (size_t)r * b.width + element + 16 * t, vmul(ifloat(sum[r][t]), vset1(scales[r])));
}

template <class Form, int kRows>
inline void float_block(const BlockRows &b) {
  alignas(64) float scores[kRows][kBlockPositions];
  int positions = most_positions(b), filled = (positions + 15) / 16 * 16, j = 0, d = 0;
  for (; j + 16 * kPositionTile <= filled; j += 16 * kPositionTile)
    float_scores<Form, kRows, kPositionTile>(b, j, scores);
  for (; j < filled; j += 16) float_scores<Form, kRows, 1>(b, j, scores);
  for (int r = 0; r < kRows; ++r) softmax_row(scores[r], b.limits[r], filled, b.tops + r, b.totals + r);
  for (; d + 16 * kElementTile <= b.width; d += 16 * kElementTile)
    float_values<Form, kRows, kElementTile>(b, d, positions, scores);
  for (; d < b.width; d += 16) float_values<Form, kRows, 1>(b, d, positions, scores);
}

// The weights of a row times its positions' scales, in 15 bits of their largest; what a unit is worth.
inline float quantize_weights(float *weights, const float *scales, int filled, int16_t *out) {
  V most = vset1(1e-30f);
  for (int j = 0; j < filled; j += 16) {
    V w = vmul(vload(weights + j), vload(scales + j));
    vstore(weights + j, w);
    most = vmax(most, w);
  }
  float largest = highest(most);
  V factor = vset1(32767.0f / largest);
  for (int j = 0; j < filled; j += 16) vround16(vmul(vload(weights + j), factor), out + j);
  return largest / 32767.0f;
}

template <int kRows>
inline void int_block(const BlockRows &b) {
  alignas(64) float scores[kRows][kBlockPositions];
  alignas(64) int16_t weights[kRows][kBlockPositions];
  int32_t bias[kRows];
  float units[kRows];
  for (int r = 0; r < kRows; ++r) {
    bias[r] = 0;
    for (int d = 0; d < b.width; ++d) bias[r] -= keys_bias * b.q8[(size_t)r * b.width + d];
  }
  int positions = most_positions(b), filled = (positions + 15) / 16 * 16, j = 0, d = 0;
  for (; j + 16 * kPositionTile <= filled; j += 16 * kPositionTile)
    int_scores<kRows, kPositionTile>(b, j, bias, scores);
  for (; j < filled; j += 16) int_scores<kRows, 1>(b, j, bias, scores);
  for (int r = 0; r < kRows; ++r) {
    softmax_row(scores[r], b.limits[r], filled, b.tops + r, b.totals + r);
    units[r] = quantize_weights(scores[r], b.value_scales, filled, weights[r]);
  }
  for (; d + 16 * kElementTile <= b.width; d += 16 * kElementTile)
    int_values<kRows, kElementTile>(b, d, positions, weights, units);
  for (; d < b.width; d += 16) int_values<kRows, 1>(b, d, positions, weights, units);
}

template <class Form>
void float_rows(const BlockRows &b) {
  switch (b.rows) {
    case 1: return float_block<Form, 1>(b);
    case 2: return float_block<Form, 2>(b);
    case 3: return float_block<Form, 3>(b);
    default: return float_block<Form, kRowTile>(b);
  }
}

void int_rows(const BlockRows &b) {
  switch (b.rows) {
    case 1: return int_block<1>(b);
    case 2: return int_block<2>(b);
    case 3: return int_block<3>(b);
    default: return int_block<kRowTile>(b);
  }
}

void merge_partials(Partial all, Partial block, int width) {
  float top = *all.top > *block.top ? *all.top : *block.top;
  V a = vexp(vset1(*all.top - top)), b = vexp(vset1(*block.top - top));
  float lane[16];
  vstore(lane, vfma(vset1(*all.total), a, vmul(vset1(*block.total), b)));
  *all.top = top;
  *all.total = lane[0];
  for (int d = 0; d < width; d += 16)
    vstore(all.sums + d, vfma(vload(all.sums + d), a, vmul(vload(block.sums + d), b)));
}

void finish_row(const float *sums, float total, int width, float *out) {
  V t = vset1(total);
  for (int d = 0; d < width; d += 16) vstore(out + d, vdiv(vload(sums + d), t));
}

void rope(const float *in, const float *cosine, const float *sine, int half, float *out) {
  for (int i = 0; i < half; ++i) {
    float a = in[i], b = in[i + half];
    out[i] = a * cosine[i] - b * sine[i];
    out[i + half] = b * cosine[i] + a * sine[i];
  }
}

bool in_range(const float *x, int n) { return vmaxabs_bits(x, n) < 0x53800000u; }  // 2^40

void to_half(const float *x, int n, uint16_t *y) {
  const V least = vset1(-65504.0f);
  for (int i = 0; i < n; i += 16) {
    V v = vmax(vload(x + i), least);
    v = vsub(vzero(), vmax(vsub(vzero(), v), least));
    vstore_f16(y + i, v);
  }
}

float to_int8(const float *x, int n, int8_t *y) {
  uint32_t bits = vmaxabs_bits(x, n);
  float most;
  __builtin_memcpy(&most, &bits, 4);
  most = most > 1e-30f ? most : 1e-30f;
  V factor = vset1(127.0f / most);
  for (int i = 0; i < n; i += 16) vround8(vmul(vload(x + i), factor), y + i);
  return most / 127.0f;
}

void hadamard(float *x, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int start = 0; start < n; start += 2 * half)
      for (int i = start; i < start + half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

float to_rotor3(const float *x, int n, uint8_t *codes) {
  V squares = vzero(), products = vzero();
  for (int i = 0; i < n; i += 16) squares = vfma(vload(x + i), vload(x + i), squares);
  float rms = __builtin_sqrtf(vsum(squares) / (float)n);
  const float first = 0.5006f * rms, second = 1.0500f * rms, third = 1.7480f * rms;
  int32_t level_squares = 0;
  for (int i = 0; i < n; i += 16) {
    float levels[16];
    for (int l = 0; l < 16; ++l) {
      float size = __builtin_fabsf(x[i + l]);
      int m = (size > first) + (size > second) + (size > third);
      codes[i + l] = (uint8_t)(m + (x[i + l] < 0.0f ? 4 : 0));
      level_squares += halo::kRotorLevels[m] * halo::kRotorLevels[m];
      levels[l] = (float)(x[i + l] < 0.0f ? -halo::kRotorLevels[m] : halo::kRotorLevels[m]);
    }
    products = vfma(vload(x + i), vload(levels), products);
  }
  return vsum(products) / (float)level_squares;
}

void unpack_rotor3(const uint8_t *packed, int groups, const uint8_t levels[8], uint8_t *out) {
  for (int g = 0; g < groups; ++g, packed += 192, out += 512) unpack512(packed, levels, out);
}

const halo::AttentionKernels attention_kernels = {
    float_rows<FloatForm>, float_rows<HalfForm>, int_rows, merge_partials, finish_row, rope,
    in_range, to_half, to_int8, hadamard, to_rotor3, unpack_rotor3};

}  // namespace
