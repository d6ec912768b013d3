// The path that any CPU can run: plain C++, no intrinsics. It states what the others do, and is not meant to be fast.
#include "kernels.h"

#include <math.h>
#include <string.h>

namespace {

struct V {
  float lane[16];
};

template <class F>
inline V each(F f) {
  V v;
  for (int l = 0; l < 16; ++l) v.lane[l] = f(l);
  return v;
}

inline V vset1(float x) {
  return each([=](int) { return x; });
}
inline V vzero() { return vset1(0.0f); }
inline V vload(const float *p) {
  return each([=](int l) { return p[l]; });
}
inline void vstore(float *p, V v) {
  for (int l = 0; l < 16; ++l) p[l] = v.lane[l];
}
inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline V vload_bf16(const uint16_t *p) {
  return each([=](int l) { return from_bits((uint32_t)p[l] << 16); });
}
inline V vfrom_ints(const int32_t *p) {
  return each([=](int l) { return (float)p[l]; });
}
inline V vadd(const V &a, const V &b) {
  return each([&](int l) { return a.lane[l] + b.lane[l]; });
}
inline V vsub(const V &a, const V &b) {
  return each([&](int l) { return a.lane[l] - b.lane[l]; });
}
inline V vmul(const V &a, const V &b) {
  return each([&](int l) { return a.lane[l] * b.lane[l]; });
}
inline V vdiv(const V &a, const V &b) {
  return each([&](int l) { return a.lane[l] / b.lane[l]; });
}
inline V vmax(const V &a, const V &b) {
  return each([&](int l) { return a.lane[l] > b.lane[l] ? a.lane[l] : b.lane[l]; });
}
inline V vfma(const V &a, const V &b, const V &c) {
  return each([&](int l) { return __builtin_fmaf(a.lane[l], b.lane[l], c.lane[l]); });
}
inline float vsum(V v) {
  for (int half = 8; half; half /= 2)
    for (int l = 0; l < half; ++l) v.lane[l] += v.lane[l + half];
  return v.lane[0];
}
inline V vscale2(const V &p, const V &t) {
  return each([&](int l) { return from_bits(to_bits(p.lane[l]) + (to_bits(t.lane[l]) << 23)); });
}

// The bits of |x| order as the numbers do, with infinity and NaN above all.
inline uint32_t vmaxabs_bits(const float *x, int n) {
  uint32_t most = 0;
  for (int i = 0; i < n; ++i) {
    uint32_t bits = to_bits(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return most;
}

inline void vquantize16(const V &x, const V &s, int8_t *q) {
  for (int l = 0; l < 16; ++l) {
    float v = nearbyintf(x.lane[l] * s.lane[l]);
    q[l] = (int8_t)(v > 127.0f ? 127.0f : v < -128.0f ? -128.0f : v);
  }
}

// The codes of index vector `vector`, column by column: engine/formats/tiles.py.
inline void codes_of(const uint8_t *chunk, int vector, uint8_t (&code)[3][64]) {
  const uint8_t *nibbles = chunk + 64 * (vector / 2), *fifth = chunk + 256;
  for (int lane = 0; lane < 64; ++lane) {
    int index = (nibbles[lane] >> 4 * (vector % 2) & 15) | (fifth[lane] >> vector & 1) << 4;
    code[2][lane] = (uint8_t)(index * 57 >> 9);  // index / 9 and, below, / 3: exact for 0 to 26
    int rest = index - 9 * code[2][lane];
    code[1][lane] = (uint8_t)(rest * 11 >> 5);
    code[0][lane] = (uint8_t)(rest - 3 * code[1][lane]);
  }
}

void ternary(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int tokens, int32_t *sums) {
  for (int block = 0; block < blocks; ++block, sums += tokens * 16) {
    memset(sums, 0, (size_t)tokens * 16 * sizeof *sums);
    for (int c = 0; c < chunks; ++c, codes += halo::kTernaryChunk)
      for (int vector = 0; vector < 8; ++vector) {
        uint8_t code[3][64];
        codes_of(codes, vector, code);
        for (int column = 0; column < 3; ++column)
          for (int t = 0; t < tokens; ++t) {
            int8_t v[4];
            memcpy(v, x + (size_t)(24 * c + 3 * vector + column) * tokens + t, 4);
            const uint8_t *own = code[column];
            for (int row = 0; row < 16; ++row, own += 4)
              sums[t * 16 + row] += own[0] * v[0] + own[1] * v[1] + own[2] * v[2] + own[3] * v[3];
          }
      }
  }
}

void coarse(const uint8_t *tiles, int chunks, const int32_t *x, int vectors, int32_t *sums) {
  memset(sums, 0, (size_t)vectors * 16 * sizeof *sums);
  for (int c = 0; c < chunks; ++c, tiles += halo::kCoarseChunk, x += 4 * vectors)
    for (int group = 0; group < 4; ++group)
      for (int lane = 0; lane < 64; ++lane) {
        int high = tiles[64 * (group / 2) + lane] >> 4 * (group % 2) & 15, low = tiles[128 + lane] >> 2 * group & 3;
        for (int v = 0; v < vectors; ++v)
          sums[v * 16 + lane / 4] += (4 * high + low) * ((const int8_t *)(x + group * vectors + v))[lane % 4];
      }
}

}  // namespace

#include "lanes.inc.h"
#include "attention_scalar.inc.h"

namespace halo {

extern const Kernels scalar_table = {"scalar", ternary, finish, rmsnorm, quantize, relu2, silu, dot_rows, coarse,
                                     coarse_bounds, &attention_kernels};

}  // namespace halo
