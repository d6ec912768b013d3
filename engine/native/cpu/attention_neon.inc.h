// The NEON operations of attention.inc.h; HALO_DOTPROD chooses the product of four int8.

namespace {

const int kPositionTile = 1, kElementTile = 1, keys_bias = 0;

struct I {
  int32x4_t q[4];
};
struct K {
  int8x16_t q[4];
};
struct E {
  int16x8_t even[2], odd[2];
};

inline V vload_f16(const uint16_t *p) {
  return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void vstore_f16(uint16_t *p, V v) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.q[i])));
}
inline int16x8_t round_pack(float32x4_t a, float32x4_t b) {
  return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a)), vqmovn_s32(vcvtnq_s32_f32(b)));
}
inline void vround8(V v, int8_t *p) {
  vst1q_s8(p, vcombine_s8(vqmovn_s16(round_pack(v.q[0], v.q[1])), vqmovn_s16(round_pack(v.q[2], v.q[3]))));
}
inline void vround16(V v, int16_t *p) {
  vst1q_s16(p, round_pack(v.q[0], v.q[1]));
  vst1q_s16(p + 8, round_pack(v.q[2], v.q[3]));
}

inline I iset1(int32_t x) { return {{vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x), vdupq_n_s32(x)}}; }
inline V ifloat(I x) {
  return each([=](int i) { return vcvtq_f32_s32(x.q[i]); });
}

inline int8x16_t load_signed(const uint8_t *p) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80)));
}
inline K load_keys(const uint8_t *p) {
  return {{load_signed(p), load_signed(p + 16), load_signed(p + 32), load_signed(p + 48)}};
}
inline I idot4(I sum, K k, const int8_t *q) {
  int32_t word;
  __builtin_memcpy(&word, q, 4);
#if HALO_DOTPROD
  int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(word));
  for (int i = 0; i < 4; ++i) sum.q[i] = vdotq_s32(sum.q[i], k.q[i], x);
#else
  int8x8_t x = vreinterpret_s8_s32(vdup_n_s32(word));  // two products of at most 127 * 127 fit an int16
  for (int i = 0; i < 4; ++i)
    sum.q[i] = vpadalq_s16(sum.q[i], vpaddq_s16(vmull_s8(vget_low_s8(k.q[i]), x), vmull_s8(vget_high_s8(k.q[i]), x)));
#endif
  return sum;
}
inline E load_values(const int8_t *p) {
  int8x16x2_t v = vld2q_s8(p);
  return {{vmovl_s8(vget_low_s8(v.val[0])), vmovl_s8(vget_high_s8(v.val[0]))},
          {vmovl_s8(vget_low_s8(v.val[1])), vmovl_s8(vget_high_s8(v.val[1]))}};
}
inline I idot2(I sum, E v, const int16_t *w) {
  for (int i = 0; i < 2; ++i) {
    sum.q[2 * i] = vmlal_n_s16(sum.q[2 * i], vget_low_s16(v.even[i]), w[0]);
    sum.q[2 * i] = vmlal_n_s16(sum.q[2 * i], vget_low_s16(v.odd[i]), w[1]);
    sum.q[2 * i + 1] = vmlal_n_s16(sum.q[2 * i + 1], vget_high_s16(v.even[i]), w[0]);
    sum.q[2 * i + 1] = vmlal_n_s16(sum.q[2 * i + 1], vget_high_s16(v.odd[i]), w[1]);
  }
  return sum;
}

inline void unpack512(const uint8_t *packed, const uint8_t levels[8], uint8_t *out) {
  const uint8x16_t table = vcombine_u8(vld1_u8(levels), vld1_u8(levels));
  for (int i = 0; i < 64; i += 16) {
    uint8x16_t signs = vld1q_u8(packed + 128 + i);
    for (int k = 0; k < 8; ++k) {
      uint8x16_t shift = vreinterpretq_u8_s8(vdupq_n_s8((int8_t)(-2 * (k % 4))));
      uint8x16_t code = vshlq_u8(vld1q_u8(packed + 64 * (k / 4) + i), vreinterpretq_s8_u8(shift));
      uint8x16_t negative = vandq_u8(vtstq_u8(signs, vdupq_n_u8((uint8_t)(1 << k))), vdupq_n_u8(4));
      vst1q_u8(out + 64 * k + i, vqtbl1q_u8(table, vorrq_u8(vandq_u8(code, vdupq_n_u8(3)), negative)));
    }
  }
}

}  // namespace

#include "attention.inc.h"
