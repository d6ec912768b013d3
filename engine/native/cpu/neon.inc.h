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
inline V vfrom_ints(const int32_t *p) {
  return each([=](int i) { return vcvtq_f32_s32(vld1q_s32(p + 4 * i)); });
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

// The codes of three columns, two bits each, for an index of 0 to 26: engine/formats/tiles.py.
const uint8_t kCodes[32] = {0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x10, 0x11,
                            0x12, 0x14, 0x15, 0x16, 0x18, 0x19, 0x1a, 0x20, 0x21, 0x22, 0x24,
                            0x25, 0x26, 0x28, 0x29, 0x2a, 0,    0,    0,    0,    0};

#if HALO_DOTPROD
struct Sum {
  int32x4_t wide = vdupq_n_s32(0);
  inline void add(uint8x16_t code, int8x16_t v) { wide = vdotq_s32(wide, vreinterpretq_s8_u8(code), v); }
  inline void settle() {}
};
#else
// Each int16 lane adds 24 products of a code (at most 2) and an int8 a chunk, at most 6,144 in magnitude: exact for five
// chunks, and widened once in four.
struct Sum {
  int32x4_t wide = vdupq_n_s32(0);
  int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);
  inline void add(uint8x16_t code, int8x16_t v) {
    int8x16_t c = vreinterpretq_s8_u8(code);
    low = vmlal_s8(low, vget_low_s8(c), vget_low_s8(v));
    high = vmlal_s8(high, vget_high_s8(c), vget_high_s8(v));
  }
  inline void settle() {
    wide = vaddq_s32(wide, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
    low = high = vdupq_n_s16(0);
  }
};
#endif

inline int8x16_t four(const int32_t *x) { return vreinterpretq_s8_s32(vdupq_n_s32(*x)); }

// Four rows: quarter `q` of each vector.
template <int kTokens>
inline void quarter_tile(const uint8_t *codes, int chunks, const int32_t *x, int stride, int32_t *sums) {
  const uint8x16x2_t table = {{vld1q_u8(kCodes), vld1q_u8(kCodes + 16)}};
  const uint8x16_t nibble = vdupq_n_u8(15), bit = vdupq_n_u8(16), three = vdupq_n_u8(3);
  Sum sum[kTokens];
  for (int c = 0; c < chunks; ++c, codes += halo::kTernaryChunk, x += 24 * stride) {
    uint8x16_t fifth = vld1q_u8(codes + 256);
    for (int vector = 0; vector < 8; ++vector) {
      uint8x16_t both = vld1q_u8(codes + 64 * (vector / 2));
      uint8x16_t index = vector % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, nibble);
      index = vorrq_u8(index, vandq_u8(vshlq_u8(fifth, vdupq_n_s8((int8_t)(4 - vector))), bit));
      uint8x16_t packed = vqtbl2q_u8(table, index);
      uint8x16_t code[3] = {vandq_u8(packed, three), vandq_u8(vshrq_n_u8(packed, 2), three), vshrq_n_u8(packed, 4)};
      for (int column = 0; column < 3; ++column)
        for (int t = 0; t < kTokens; ++t) sum[t].add(code[column], four(x + (3 * vector + column) * stride + t));
    }
    if (c % 4 == 3 || c + 1 == chunks)
      for (Sum &s : sum) s.settle();
  }
  for (int t = 0; t < kTokens; ++t) vst1q_s32(sums + 16 * t, sum[t].wide);
}

template <int kTokens>
inline void block_tile(const uint8_t *codes, int chunks, const int32_t *x, int stride, int32_t *sums) {
  for (int q = 0; q < 4; ++q) quarter_tile<kTokens>(codes + 16 * q, chunks, x, stride, sums + 4 * q);
}

void ternary_one(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int32_t *sums) {
  for (int block = 0; block < blocks; ++block, codes += (size_t)chunks * halo::kTernaryChunk, sums += 16)
    block_tile<1>(codes, chunks, x, 1, sums);
}

template <int kBlocks, int kTokens>
inline void tile(const uint8_t *codes, int chunks, const int32_t *x, int32_t *sums) {
  int t = 0;
  for (; t + 4 <= kTokens; t += 4) block_tile<4>(codes, chunks, x + t, kTokens, sums + 16 * t);
  if (kTokens % 4) block_tile<kTokens % 4 ? kTokens % 4 : 1>(codes, chunks, x + t, kTokens, sums + 16 * t);
}

const int kPair = 1;

// A level of at most 63 times an int8, twice in a lane: at most 16,128 in magnitude, so widened at once.
inline int32x4_t add_levels(int32x4_t sum, uint8x16_t u, int8x16_t v) {
#if HALO_DOTPROD
  return vdotq_s32(sum, vreinterpretq_s8_u8(u), v);
#else
  int8x16_t s = vreinterpretq_s8_u8(u);
  int16x8_t low = vmull_s8(vget_low_s8(s), vget_low_s8(v)), high = vmull_s8(vget_high_s8(s), vget_high_s8(v));
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

template <int kVectors>
inline void coarse_quarter(const uint8_t *tiles, int chunks, const int32_t *x, int32_t *sums) {
  const uint8x16_t nibble = vdupq_n_u8(0x3c), two = vdupq_n_u8(3);
  int32x4_t sum[kVectors];
  for (int32x4_t &s : sum) s = vdupq_n_s32(0);
  for (int c = 0; c < chunks; ++c, tiles += halo::kCoarseChunk, x += 4 * kVectors) {
    uint8x16_t rest = vld1q_u8(tiles + 128);
    for (int g = 0; g < 4; ++g) {
      uint8x16_t high = vld1q_u8(tiles + 64 * (g / 2));
      uint8x16_t u = vorrq_u8(vandq_u8(g % 2 ? vshrq_n_u8(high, 2) : vshlq_n_u8(high, 2), nibble),
                              vandq_u8(vshlq_u8(rest, vdupq_n_s8((int8_t)(-2 * g))), two));
      for (int v = 0; v < kVectors; ++v) sum[v] = add_levels(sum[v], u, four(x + g * kVectors + v));
    }
  }
  for (int v = 0; v < kVectors; ++v) vst1q_s32(sums + 16 * v, sum[v]);
}

template <int kVectors>
void coarse_tile(const uint8_t *tiles, int chunks, const int32_t *x, int32_t *sums) {
  for (int q = 0; q < 4; ++q) coarse_quarter<kVectors>(tiles + 16 * q, chunks, x, sums + 4 * q);
}

}  // namespace

#include "lanes.inc.h"
#include "attention_neon.inc.h"
#include "walk.inc.h"
