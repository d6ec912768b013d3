// The AVX2 + FMA path: x86-64-v3, without VNNI. Its ternary product is maddubs with sums in int16.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

struct V {
  __m256 lo, hi;
};

inline V vset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V vzero() { return vset1(0.0f); }
inline V vload(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void vstore(float *p, V v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
inline __m256 widen_bf16(const uint16_t *p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V vload_bf16(const uint16_t *p) { return {widen_bf16(p), widen_bf16(p + 8)}; }
inline V vadd(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V vsub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V vmul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V vdiv(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V vmax(V a, V b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V vfma(V a, V b, V c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline float vsum(V v) {
  __m256 eight = _mm256_add_ps(v.lo, v.hi);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline __m256 scale2(__m256 p, __m256 t) {
  __m256i power = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}
inline V vscale2(V p, V t) { return {scale2(p.lo, t.lo), scale2(p.hi, t.hi)}; }

// The bits of |x| order as the numbers do, with infinity and NaN above all.
inline uint32_t vmaxabs_bits(const float *x, int n) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 16) {
    V v = vload(x + i);
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v.lo), magnitude));
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v.hi), magnitude));
  }
  uint32_t lane[8], best = 0;
  _mm256_storeu_si256((__m256i *)lane, most);
  for (int l = 0; l < 8; ++l) best = lane[l] > best ? lane[l] : best;
  return best;
}

inline void vquantize16(V x, V s, int8_t *q) {
  __m256i lo = _mm256_cvtps_epi32(_mm256_mul_ps(x.lo, s.lo));
  __m256i hi = _mm256_cvtps_epi32(_mm256_mul_ps(x.hi, s.hi));
  __m128i first = _mm_packs_epi32(_mm256_castsi256_si128(lo), _mm256_extracti128_si256(lo, 1));
  __m128i second = _mm_packs_epi32(_mm256_castsi256_si128(hi), _mm256_extracti128_si256(hi, 1));
  _mm_storeu_si128((__m128i *)q, _mm_packs_epi16(first, second));
}

inline int32_t total(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

inline __m256i load_bytes(const uint8_t *p, int left) {
  return left >= 32 ? _mm256_loadu_si256((const __m256i *)p)
                    : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)p));
}

// maddubs adds two products of a code (at most 3) and an int8: at most 3 * 128 * 2 = 768 in magnitude, far from the
// saturation of int16. Four planes of eight steps add up to 4 * 8 * 768 = 24,576 < 32,768, so the int16 sums are exact
// and are widened once in eight steps.
template <int kRows, int kTokens>
inline void tile(const uint8_t *codes, int row_bytes, const int8_t *x, size_t x_stride, int32_t *sums,
                 size_t sums_stride) {
  const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  __m256i wide[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) wide[r][t] = _mm256_setzero_si256();
  for (int start = 0; start < row_bytes; start += 256) {
    __m256i narrow[kRows][kTokens];
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTokens; ++t) narrow[r][t] = _mm256_setzero_si256();
    int end = start + 256 < row_bytes ? start + 256 : row_bytes;
    for (int b = start; b < end; b += 32) {
      __m256i w[kRows];
      for (int r = 0; r < kRows; ++r) w[r] = load_bytes(codes + (size_t)r * row_bytes + b, row_bytes - b);
      for (int plane = 0; plane < 4; ++plane) {
        for (int t = 0; t < kTokens; ++t) {
          __m256i v = _mm256_loadu_si256((const __m256i *)(x + t * x_stride + (size_t)plane * row_bytes + b));
          for (int r = 0; r < kRows; ++r) {
            __m256i code = _mm256_and_si256(w[r], three);
            narrow[r][t] = _mm256_add_epi16(narrow[r][t], _mm256_maddubs_epi16(code, v));
          }
        }
        for (int r = 0; r < kRows; ++r) w[r] = _mm256_srli_epi16(w[r], 2);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTokens; ++t)
        wide[r][t] = _mm256_add_epi32(wide[r][t], _mm256_madd_epi16(narrow[r][t], ones));
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sums[t * sums_stride + r] = total(wide[r][t]);
}

}  // namespace

#include "lanes.inc.h"
#include "attention_avx2.inc.h"
#include "tiles.inc.h"

namespace halo {

extern const Kernels avx2_table = {"avx2", ternary<4, 2>, rmsnorm, quantize, relu2, dot_rows, &attention_kernels};

}  // namespace halo

#endif
