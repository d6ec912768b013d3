// The AVX-512 operations of attention.inc.h, with VNNI.

namespace {

const int kPositionTile = 2, kElementTile = 4, keys_bias = 128;

typedef __m512i I;
typedef __m512i K;
typedef __m512i E;

inline V vload_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline void vstore_f16(uint16_t *p, V v) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void vround8(V v, int8_t *p) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); }
inline void vround16(V v, int16_t *p) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}

inline I iset1(int32_t x) { return _mm512_set1_epi32(x); }
inline V ifloat(I x) { return _mm512_cvtepi32_ps(x); }

inline int32_t word(const void *p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return x;
}
inline K load_keys(const uint8_t *p) { return _mm512_loadu_si512(p); }
inline I idot4(I sum, K k, const int8_t *q) { return _mm512_dpbusd_epi32(sum, k, _mm512_set1_epi32(word(q))); }
inline E load_values(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
inline I idot2(I sum, E v, const int16_t *w) { return _mm512_dpwssd_epi32(sum, v, _mm512_set1_epi32(word(w))); }

inline void unpack512(const uint8_t *packed, const uint8_t levels[8], uint8_t *out) {
  const __m512i low = _mm512_set1_epi32(word(levels)), high = _mm512_set1_epi32(word(levels + 4));
  const __m512i three = _mm512_set1_epi8(3), signs = _mm512_loadu_si512(packed + 128);
  for (int k = 0; k < 8; ++k) {
    __m512i code = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(packed + 64 * (k / 4)), 2 * (k % 4)), three);
    __mmask64 negative = _mm512_test_epi8_mask(signs, _mm512_set1_epi8((char)(1 << k)));
    __m512i level = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(low, code), negative, high, code);
    _mm512_storeu_si512(out + 64 * k, level);
  }
}

}  // namespace

#include "attention.inc.h"
