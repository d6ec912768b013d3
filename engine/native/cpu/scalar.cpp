// The path that any CPU can run: plain C++, no intrinsics. It states what the others do, and is not meant to be fast.
#include "kernels.h"

#include <math.h>

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

int32_t dot(const uint8_t *codes, int row_bytes, const int8_t *x) {
  int32_t sum = 0;
  for (int plane = 0; plane < 4; ++plane, x += row_bytes)
    for (int b = 0; b < row_bytes; ++b) sum += (codes[b] >> 2 * plane & 3) * x[b];
  return sum;
}

void ternary(const uint8_t *codes, int row_bytes, int rows, const int8_t *x, size_t x_stride, int tokens,
             int32_t *sums, size_t sums_stride) {
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < rows; ++r)
      sums[t * sums_stride + r] = dot(codes + (size_t)r * row_bytes, row_bytes, x + t * x_stride);
}

}  // namespace

#include "lanes.inc.h"
#include "attention_scalar.inc.h"

namespace halo {

extern const Kernels scalar_table = {"scalar", ternary, rmsnorm, quantize, relu2, dot_rows, &attention_kernels};

}  // namespace halo
