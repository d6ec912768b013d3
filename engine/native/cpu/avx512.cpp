// The AVX-512 path with VNNI: 64 bytes of codes and four vpdpbusd a step.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

typedef __m512 V;

inline V vset1(float x) { return _mm512_set1_ps(x); }
inline V vzero() { return _mm512_setzero_ps(); }
inline V vload(const float *p) { return _mm512_loadu_ps(p); }
inline void vstore(float *p, V v) { _mm512_storeu_ps(p, v); }
inline V vload_bf16(const uint16_t *p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V vadd(V a, V b) { return _mm512_add_ps(a, b); }
inline V vsub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
inline V vmax(V a, V b) { return _mm512_max_ps(a, b); }
inline V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float vsum(V v) {
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline V vscale2(V p, V t) {
  __m512i power = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power));
}

// The bits of |x| order as the numbers do, with infinity and NaN above all.
inline uint32_t vmaxabs_bits(const float *x, int n) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < n; i += 16)
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(vload(x + i)), magnitude));
  return (uint32_t)_mm512_reduce_max_epu32(most);
}

inline void vquantize16(V x, V s, int8_t *q) {
  __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(x, s));
  _mm_storeu_si128((__m128i *)q, _mm512_cvtsepi32_epi8(rounded));
}

inline __m512i load_bytes(const void *p, int left) {
  if (left >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((~(__mmask64)0) >> (64 - left), p);
}

// The shifts of a step are shared by its tokens: codes of one plane are worth a register each.
template <int kRows, int kTokens>
inline void tile(const uint8_t *codes, int row_bytes, const int8_t *x, size_t x_stride, int32_t *sums,
                 size_t sums_stride) {
  const __m512i three = _mm512_set1_epi8(3);
  __m512i sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_setzero_si512();
  for (int b = 0; b < row_bytes; b += 64) {
    __m512i w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = load_bytes(codes + (size_t)r * row_bytes + b, row_bytes - b);
    for (int plane = 0; plane < 4; ++plane) {
      for (int t = 0; t < kTokens; ++t) {
        __m512i v = _mm512_loadu_si512(x + t * x_stride + (size_t)plane * row_bytes + b);
        for (int r = 0; r < kRows; ++r)
          sum[r][t] = _mm512_dpbusd_epi32(sum[r][t], _mm512_and_si512(w[r], three), v);
      }
      for (int r = 0; r < kRows; ++r) w[r] = _mm512_srli_epi16(w[r], 2);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sums[t * sums_stride + r] = _mm512_reduce_add_epi32(sum[r][t]);
}

}  // namespace

#include "lanes.inc.h"
#include "attention_avx512.inc.h"
#include "tiles.inc.h"

namespace halo {

extern const Kernels avx512_table = {"avx512", ternary<4, 4>, rmsnorm, quantize, relu2, dot_rows, &attention_kernels};

}  // namespace halo

#endif
