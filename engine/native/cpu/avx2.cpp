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
inline V vfrom_ints(const int32_t *p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)p)),
          _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)p + 1))};
}
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

// The codes of three columns, two bits each, for an index below 16 and for 16 to 26: engine/formats/tiles.py.
alignas(16) const uint8_t kCodes[32] = {0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x10, 0x11,
                                        0x12, 0x14, 0x15, 0x16, 0x18, 0x19, 0x1a, 0x20, 0x21, 0x22, 0x24,
                                        0x25, 0x26, 0x28, 0x29, 0x2a, 0,    0,    0,    0,    0};

const int kAhead = 8192;  // bytes: what one token's products read is fetched two pages before

struct Tables {
  __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)kCodes));
  __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)kCodes + 1));
  __m256i nibble = _mm256_set1_epi8(15);
};

inline __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }

// Eight rows of index vector `kVector` as three codes a byte: the fifth bit is moved to where a blend looks.
template <int kVector>
inline __m256i look_up(const uint8_t *chunk, __m256i fifth, const Tables &t) {
  __m256i both = load(chunk + 64 * (kVector / 2));
  __m256i index = _mm256_and_si256(kVector % 2 ? _mm256_srli_epi16(both, 4) : both, t.nibble);
  return _mm256_blendv_epi8(_mm256_shuffle_epi8(t.low, index), _mm256_shuffle_epi8(t.high, index),
                            _mm256_slli_epi16(fifth, 7 - kVector));
}

template <int kVector, int kTokens>
inline void step(const uint8_t *chunk, __m256i fifth, const Tables &t, const int32_t *x, int stride,
                 __m256i (&narrow)[kTokens]) {
  const __m256i three = _mm256_set1_epi8(3);
  __m256i packed = look_up<kVector>(chunk, fifth, t);
  __m256i first = _mm256_and_si256(packed, three), second = _mm256_and_si256(_mm256_srli_epi16(packed, 2), three),
          third = _mm256_and_si256(_mm256_srli_epi16(packed, 4), three);
  x += 3 * kVector * stride;
  for (int k = 0; k < kTokens; ++k) {
    __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(first, _mm256_set1_epi32(x[k])),
                                   _mm256_maddubs_epi16(second, _mm256_set1_epi32(x[stride + k])));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(third, _mm256_set1_epi32(x[2 * stride + k])));
    narrow[k] = _mm256_add_epi16(narrow[k], sum);
  }
}

// maddubs adds two products of a code (at most 2) and an int8: at most 512 in magnitude. A chunk adds 24 of them, 12,288;
// two chunks stay below 32,768, so the int16 sums are exact and are widened once in two chunks.
template <int kTokens>
inline void half_tile(const uint8_t *codes, int chunks, const int32_t *x, int stride, int32_t *sums) {
  const Tables t;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i wide[kTokens], narrow[kTokens];
  for (int k = 0; k < kTokens; ++k) wide[k] = narrow[k] = _mm256_setzero_si256();
  for (int c = 0; c < chunks; ++c, codes += halo::kTernaryChunk, x += 24 * stride) {
    for (int line = 0; kTokens == 1 && line < 5; ++line)
      _mm_prefetch((const char *)codes + kAhead + 64 * line, _MM_HINT_T1);
    __m256i fifth = load(codes + 256);
    step<0, kTokens>(codes, fifth, t, x, stride, narrow);
    step<1, kTokens>(codes, fifth, t, x, stride, narrow);
    step<2, kTokens>(codes, fifth, t, x, stride, narrow);
    step<3, kTokens>(codes, fifth, t, x, stride, narrow);
    step<4, kTokens>(codes, fifth, t, x, stride, narrow);
    step<5, kTokens>(codes, fifth, t, x, stride, narrow);
    step<6, kTokens>(codes, fifth, t, x, stride, narrow);
    step<7, kTokens>(codes, fifth, t, x, stride, narrow);
    if (c % 2 == 0 && c + 1 < chunks) continue;
    for (int k = 0; k < kTokens; ++k) {
      wide[k] = _mm256_add_epi32(wide[k], _mm256_madd_epi16(narrow[k], ones));
      narrow[k] = _mm256_setzero_si256();
    }
  }
  for (int k = 0; k < kTokens; ++k) _mm256_storeu_si256((__m256i *)(sums + 16 * k), wide[k]);
}

template <int kTokens>
inline void block_tile(const uint8_t *codes, int chunks, const int32_t *x, int stride, int32_t *sums) {
  half_tile<kTokens>(codes, chunks, x, stride, sums);
  half_tile<kTokens>(codes + 32, chunks, x, stride, sums + 8);
}

void ternary_one(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int32_t *sums) {
  for (int block = 0; block < blocks; ++block, codes += (size_t)chunks * halo::kTernaryChunk, sums += 16)
    block_tile<1>(codes, chunks, x, 1, sums);
}

// More than four tokens' sums do not stay in 16 registers.
template <int kBlocks, int kTokens>
inline void tile(const uint8_t *codes, int chunks, const int32_t *x, int32_t *sums) {
  int t = 0;
  for (; t + 4 <= kTokens; t += 4) block_tile<4>(codes, chunks, x + t, kTokens, sums + 16 * t);
  if (kTokens % 4) block_tile<kTokens % 4 ? kTokens % 4 : 1>(codes, chunks, x + t, kTokens, sums + 16 * t);
}

const int kPair = 1;

// Levels 0..63 of four groups of columns, eight rows.
inline void levels(const uint8_t *chunk, __m256i (&u)[4]) {
  const __m256i nibble = _mm256_set1_epi8(0x3c), two = _mm256_set1_epi8(3);
  __m256i rest = load(chunk + 128);
  for (int half = 0; half < 2; ++half) {
    __m256i high = load(chunk + 64 * half);
    u[2 * half] = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(high, 2), nibble),
                                  _mm256_and_si256(_mm256_srli_epi16(rest, 4 * half), two));
    u[2 * half + 1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(high, 2), nibble),
                                      _mm256_and_si256(_mm256_srli_epi16(rest, 4 * half + 2), two));
  }
}

// One maddubs is at most 2 * 63 * 128 = 16,128 in magnitude: widened at once.
template <int kVectors>
inline void coarse_half(const uint8_t *tiles, int chunks, const int32_t *x, int32_t *sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[kVectors];
  for (__m256i &s : sum) s = _mm256_setzero_si256();
  for (int c = 0; c < chunks; ++c, tiles += halo::kCoarseChunk, x += 4 * kVectors) {
    for (int line = 0; line < 3; ++line) _mm_prefetch((const char *)tiles + kAhead + 64 * line, _MM_HINT_T1);
    __m256i u[4];
    levels(tiles, u);
    for (int g = 0; g < 4; ++g)
      for (int v = 0; v < kVectors; ++v) {
        __m256i pairs = _mm256_maddubs_epi16(u[g], _mm256_set1_epi32(x[g * kVectors + v]));
        sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(pairs, ones));
      }
  }
  for (int v = 0; v < kVectors; ++v) _mm256_storeu_si256((__m256i *)(sums + 16 * v), sum[v]);
}

template <int kVectors>
void coarse_tile(const uint8_t *tiles, int chunks, const int32_t *x, int32_t *sums) {
  coarse_half<kVectors>(tiles, chunks, x, sums);
  coarse_half<kVectors>(tiles + 32, chunks, x, sums + 8);
}

}  // namespace

#include "lanes.inc.h"
#include "attention_avx2.inc.h"
#include "walk.inc.h"

namespace halo {

extern const Kernels avx2_table = {"avx2", ternary, finish, rmsnorm, quantize, relu2, silu, dot_rows, coarse,
                                   coarse_bounds, &attention_kernels};

}  // namespace halo

#endif
