// The NEON lanes and walk, included by neon.cpp and neondot.cpp after `tile` is chosen by HALO_DOTPROD.
#include <arm_neon.h>

namespace {

struct V {
  float32x4_t q[4];
};

template <class F>
inline V each(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

inline V vset1(float x) {
  return each([=](int) { return vdupq_n_f32(x); });
}
inline V vzero() { return vset1(0.0f); }
inline V vload(const float *p) {
  return each([=](int i) { return vld1q_f32(p + 4 * i); });
}
inline void vstore(float *p, V v) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.q[i]);
}
inline V vload_bf16(const uint16_t *p) {
  return each([=](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline V vadd(V a, V b) {
  return each([=](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
inline V vsub(V a, V b) {
  return each([=](int i) { return vsubq_f32(a.q[i], b.q[i]); });
}
inline V vmul(V a, V b) {
  return each([=](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
inline V vdiv(V a, V b) {
  return each([=](int i) { return vdivq_f32(a.q[i], b.q[i]); });
}
inline V vmax(V a, V b) {
  return each([=](int i) { return vmaxq_f32(a.q[i], b.q[i]); });
}
inline V vfma(V a, V b, V c) {
  return each([=](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
inline float vsum(V v) {
  float32x4_t four = vaddq_f32(vaddq_f32(v.q[0], v.q[2]), vaddq_f32(v.q[1], v.q[3]));
  float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline V vscale2(V p, V t) {
  return each([=](int i) {
    uint32x4_t power = vshlq_n_u32(vreinterpretq_u32_f32(t.q[i]), 23);
    return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p.q[i]), power));
  });
}

// The bits of |x| order as the numbers do, with infinity and NaN above all.
inline uint32_t vmaxabs_bits(const float *x, int n) {
  uint32x4_t most = vdupq_n_u32(0);
  for (int i = 0; i < n; i += 4)
    most = vmaxq_u32(most, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), vdupq_n_u32(0x7fffffffu)));
  return vmaxvq_u32(most);
}

inline void vquantize16(V x, V s, int8_t *q) {
  int32x4_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = vcvtnq_s32_f32(vmulq_f32(x.q[i], s.q[i]));
  int16x8_t first = vcombine_s16(vqmovn_s32(r[0]), vqmovn_s32(r[1]));
  int16x8_t second = vcombine_s16(vqmovn_s32(r[2]), vqmovn_s32(r[3]));
  vst1q_s8(q, vcombine_s8(vqmovn_s16(first), vqmovn_s16(second)));
}

#if HALO_DOTPROD
struct Sum {
  int32x4_t wide = vdupq_n_s32(0);
  inline void add(int8x16_t code, int8x16_t v) { wide = vdotq_s32(wide, code, v); }
  inline void settle() {}
};
#else
// Two products of a code (at most 3) and an int8 fall into one int16 lane a call: at most 768 in magnitude, four planes
// of eight steps 24,576 < 32,768. So the int16 sums are exact, and are widened once in eight steps.
struct Sum {
  int32x4_t wide = vdupq_n_s32(0);
  int16x8_t narrow = vdupq_n_s16(0);
  inline void add(int8x16_t code, int8x16_t v) {
    narrow = vmlal_s8(narrow, vget_low_s8(code), vget_low_s8(v));
    narrow = vmlal_s8(narrow, vget_high_s8(code), vget_high_s8(v));
  }
  inline void settle() {
    wide = vpadalq_s16(wide, narrow);
    narrow = vdupq_n_s16(0);
  }
};
#endif

template <int kRows, int kTokens>
inline void tile(const uint8_t *codes, int row_bytes, const int8_t *x, size_t x_stride, int32_t *sums,
                 size_t sums_stride) {
  Sum sum[kRows][kTokens];
  for (int b = 0; b < row_bytes; b += 16) {
    uint8x16_t w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = vld1q_u8(codes + (size_t)r * row_bytes + b);
    for (int plane = 0; plane < 4; ++plane) {
      for (int t = 0; t < kTokens; ++t) {
        int8x16_t v = vld1q_s8(x + t * x_stride + (size_t)plane * row_bytes + b);
        for (int r = 0; r < kRows; ++r) sum[r][t].add(vreinterpretq_s8_u8(vandq_u8(w[r], vdupq_n_u8(3))), v);
      }
      for (int r = 0; r < kRows; ++r) w[r] = vshrq_n_u8(w[r], 2);
    }
    if (b % 128 == 112 || b + 16 == row_bytes)
      for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) sum[r][t].settle();
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sums[t * sums_stride + r] = vaddvq_s32(sum[r][t].wide);
}

}  // namespace

#include "lanes.inc.h"
#include "attention_neon.inc.h"
#include "tiles.inc.h"
