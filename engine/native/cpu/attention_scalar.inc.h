// The operations of attention.inc.h in plain C++. They state what the others do.
#include <string.h>

namespace {

const int kPositionTile = 1, kElementTile = 1, keys_bias = 0;

struct I {
  int32_t lane[16];
};
typedef const uint8_t *K;
typedef const int8_t *E;

inline float from_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest < 0x400) return (sign ? -1.0f : 1.0f) * ((float)rest * 5.9604644775390625e-8f);  // 2^-24: subnormal
  return from_bits(sign | ((rest << 13) + (112u << 23)));  // the cache holds no infinity
}

// Nearest even. |x| is at most 65504.
inline uint16_t to_half_bits(float x) {
  uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  // Below 2^-14 the unit is 2^-24: adding 0.5, whose unit that is, rounds to it.
  if (size < 0x38800000) return (uint16_t)(sign | (to_bits(from_bits(size) + 0.5f) - 0x3f000000));
  size += 0xfff + (size >> 13 & 1);
  return (uint16_t)(sign | (size - (112u << 23)) >> 13);
}

inline V vload_f16(const uint16_t *p) {
  return each([=](int l) { return from_half(p[l]); });
}
inline void vstore_f16(uint16_t *p, const V &v) {
  for (int l = 0; l < 16; ++l) p[l] = to_half_bits(v.lane[l]);
}
inline void vround8(const V &v, int8_t *p) {
  for (int l = 0; l < 16; ++l) p[l] = (int8_t)nearbyintf(v.lane[l]);
}
inline void vround16(const V &v, int16_t *p) {
  for (int l = 0; l < 16; ++l) p[l] = (int16_t)nearbyintf(v.lane[l]);
}

inline I iset1(int32_t x) {
  I v;
  for (int l = 0; l < 16; ++l) v.lane[l] = x;
  return v;
}
inline V ifloat(const I &x) {
  return each([&](int l) { return (float)x.lane[l]; });
}
inline K load_keys(const uint8_t *p) { return p; }
inline I idot4(I sum, K k, const int8_t *q) {
  for (int l = 0; l < 16; ++l)
    for (int d = 0; d < 4; ++d) sum.lane[l] += (k[4 * l + d] - 128) * q[d];
  return sum;
}
inline E load_values(const int8_t *p) { return p; }
inline I idot2(I sum, E v, const int16_t *w) {
  for (int l = 0; l < 16; ++l) sum.lane[l] += v[2 * l] * w[0] + v[2 * l + 1] * w[1];
  return sum;
}

inline void unpack512(const uint8_t *packed, const uint8_t levels[8], uint8_t *out) {
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 64; ++i) {
      int code = (packed[64 * (k / 4) + i] >> 2 * (k % 4) & 3) + 4 * (packed[128 + i] >> k & 1);
      out[64 * k + i] = levels[code];
    }
}

}  // namespace

#include "attention.inc.h"
