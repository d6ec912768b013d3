// The AVX2 operations of attention.inc.h, with F16C.

namespace {

const int kPositionTile = 1, kElementTile = 1, keys_bias = 0;

struct I {
  __m256i lo, hi;
};
typedef I K;
typedef I E;

inline V vload_f16(const uint16_t *p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
inline void vstore_f16(uint16_t *p, V v) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256i round_pack(V v) {  // 16 int16 in order
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi)), 0xd8);
}
inline void vround8(V v, int8_t *p) {
  __m256i x = round_pack(v);
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
inline void vround16(V v, int16_t *p) { _mm256_storeu_si256((__m256i *)p, round_pack(v)); }

inline I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline V ifloat(I x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }

inline __m256i four(const void *p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
inline __m256i load_signed(const uint8_t *p) {
  return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)p), _mm256_set1_epi8((char)0x80));
}
inline K load_keys(const uint8_t *p) { return {load_signed(p), load_signed(p + 32)}; }
// |k| times q with k's sign: two products of at most 127 * 127 fit an int16.
inline __m256i dot4(__m256i sum, __m256i k, __m256i q) {
  __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(k), _mm256_sign_epi8(q, k));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I idot4(I sum, K k, const int8_t *q) {
  __m256i x = four(q);
  return {dot4(sum.lo, k.lo, x), dot4(sum.hi, k.hi, x)};
}
inline E load_values(const int8_t *p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)),
          _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p + 16)))};
}
inline I idot2(I sum, E v, const int16_t *w) {
  __m256i x = four(w);
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(v.lo, x)), _mm256_add_epi32(sum.hi, _mm256_madd_epi16(v.hi, x))};
}

inline void unpack512(const uint8_t *packed, const uint8_t levels[8], uint8_t *out) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadl_epi64((const __m128i *)levels));
  const __m256i three = _mm256_set1_epi8(3), sign = _mm256_set1_epi8(4);
  for (int i = 0; i < 64; i += 32) {
    __m256i signs = _mm256_loadu_si256((const __m256i *)(packed + 128 + i));
    for (int k = 0; k < 8; ++k) {
      __m256i pairs = _mm256_loadu_si256((const __m256i *)(packed + 64 * (k / 4) + i));
      __m256i bit = _mm256_set1_epi8((char)(1 << k));
      __m256i negative = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(signs, bit), bit), sign);
      __m256i code = _mm256_and_si256(_mm256_srli_epi16(pairs, 2 * (k % 4)), three);
      _mm256_storeu_si256((__m256i *)(out + 64 * k + i), _mm256_shuffle_epi8(table, _mm256_or_si256(code, negative)));
    }
  }
}

}  // namespace

#include "attention.inc.h"
