// The AVX-512 paths with VNNI: 16 rows and four columns a vpdpbusd. avx512.cpp and avx512vbmi.cpp include it, each
// compiled for its instruction sets: with VBMI, codes take fewer steps to unpack.
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
inline V vfrom_ints(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
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

// The codes of three columns, two bits each, for an index below 16 and for 16 to 26: engine/formats/tiles.py.
alignas(32) const uint8_t kCodes[32] = {0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0a, 0x10, 0x11,
                                        0x12, 0x14, 0x15, 0x16, 0x18, 0x19, 0x1a, 0x20, 0x21, 0x22, 0x24,
                                        0x25, 0x26, 0x28, 0x29, 0x2a, 0,    0,    0,    0,    0};

const int kAhead = 8192;  // bytes: what one token's products read is fetched two pages before

// Index vectors 2 v and 2 v + 1 of a chunk, each as three codes a byte.
#if defined(__AVX512VBMI__)

struct Tables {  // vpermb looks five bits up at once. It sees a sixth, which is anything here: so the table stands twice.
  __m512i codes = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i *)kCodes));
};

// The low four bits of `low` with bit kBit of `fifth` above them. What the shifts bring in from a neighbour lies higher.
template <int kBit>
inline __m512i whole_index(__m512i low, __m512i fifth) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i bit = kBit < 4 ? _mm512_slli_epi16(fifth, (4 - kBit) & 15) : _mm512_srli_epi16(fifth, (kBit - 4) & 15);
  return _mm512_ternarylogic_epi32(nibble, low, bit, 0xca);
}

template <int kVector>
inline void look_up(const uint8_t *chunk, __m512i fifth, const Tables &t, __m512i *even, __m512i *odd) {
  __m512i both = _mm512_loadu_si512(chunk + 64 * kVector);
  *even = _mm512_permutexvar_epi8(whole_index<2 * kVector>(both, fifth), t.codes);
  *odd = _mm512_permutexvar_epi8(whole_index<2 * kVector + 1>(_mm512_srli_epi16(both, 4), fifth), t.codes);
}

#else

struct Tables {
  __m512i low = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)kCodes));
  __m512i high = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)kCodes + 1));
  __m512i nibble = _mm512_set1_epi8(15);
};

template <int kVector>
inline void look_up(const uint8_t *chunk, __m512i fifth, const Tables &t, __m512i *even, __m512i *odd) {
  __m512i both = _mm512_loadu_si512(chunk + 64 * kVector);
  __m512i low = _mm512_and_si512(both, t.nibble), high = _mm512_and_si512(_mm512_srli_epi16(both, 4), t.nibble);
  __mmask64 low_bit = _mm512_test_epi8_mask(fifth, _mm512_set1_epi8((char)(1 << 2 * kVector)));
  __mmask64 high_bit = _mm512_test_epi8_mask(fifth, _mm512_set1_epi8((char)(2 << 2 * kVector)));
  *even = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(t.low, low), low_bit, t.high, low);
  *odd = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(t.low, high), high_bit, t.high, high);
}

#endif

inline __m512i four(const int32_t *x) { return _mm512_set1_epi32(*x); }

// One token. The codes are multiplied where they stand in their byte, so the sums of the second and third column are
// 4 and 16 times too large, and exactly divisible.
inline void multiply_in_place(__m512i even, __m512i odd, const int32_t *x, __m512i *sum) {
  const __m512i first = _mm512_set1_epi8(0x03), second = _mm512_set1_epi8(0x0c), third = _mm512_set1_epi8(0x30);
  sum[0] = _mm512_dpbusd_epi32(sum[0], _mm512_and_si512(even, first), four(x));
  sum[1] = _mm512_dpbusd_epi32(sum[1], _mm512_and_si512(even, second), four(x + 1));
  sum[2] = _mm512_dpbusd_epi32(sum[2], _mm512_and_si512(even, third), four(x + 2));
  sum[3] = _mm512_dpbusd_epi32(sum[3], _mm512_and_si512(odd, first), four(x + 3));
  sum[4] = _mm512_dpbusd_epi32(sum[4], _mm512_and_si512(odd, second), four(x + 4));
  sum[5] = _mm512_dpbusd_epi32(sum[5], _mm512_and_si512(odd, third), four(x + 5));
}

inline void store_in_place(const __m512i *sum, int32_t *sums) {
  __m512i four_fold = _mm512_add_epi32(sum[1], sum[4]), sixteen_fold = _mm512_add_epi32(sum[2], sum[5]);
  __m512i all = _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[3]), _mm512_srai_epi32(four_fold, 2));
  _mm512_storeu_si512(sums, _mm512_add_epi32(all, _mm512_srai_epi32(sixteen_fold, 4)));
}

template <int kVector>
inline void step_one(const uint8_t *chunk, __m512i fifth, const Tables &t, const int32_t *x, __m512i *sum) {
  __m512i even, odd;
  look_up<kVector>(chunk, fifth, t, &even, &odd);
  multiply_in_place(even, odd, x + 6 * kVector, sum);
}

void ternary_one(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int32_t *sums) {
  const Tables t;
  for (int block = 0; block < blocks; ++block, sums += 16) {
    __m512i sum[6];
    for (__m512i &s : sum) s = _mm512_setzero_si512();
    for (int c = 0; c < chunks; ++c, codes += halo::kTernaryChunk) {
      for (int line = 0; line < 5; ++line) _mm_prefetch((const char *)codes + kAhead + 64 * line, _MM_HINT_T1);
      __m512i fifth = _mm512_loadu_si512(codes + 256);
      const int32_t *group = x + 24 * c;
      step_one<0>(codes, fifth, t, group, sum);
      step_one<1>(codes, fifth, t, group, sum);
      step_one<2>(codes, fifth, t, group, sum);
      step_one<3>(codes, fifth, t, group, sum);
    }
    store_in_place(sum, sums);
  }
}

template <int kBlocks, int kTokens>
inline void multiply_codes(const __m512i *packed, const int32_t *x, __m512i (&sum)[kBlocks][kTokens]) {
  const __m512i three = _mm512_set1_epi8(3);
#pragma GCC unroll 3
  for (int column = 0; column < 3; ++column, x += kTokens) {
    __m512i code[kBlocks];
    for (int b = 0; b < kBlocks; ++b) code[b] = _mm512_and_si512(_mm512_srli_epi16(packed[b], 2 * column), three);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      __m512i v = four(x + t);
      for (int b = 0; b < kBlocks; ++b) sum[b][t] = _mm512_dpbusd_epi32(sum[b][t], code[b], v);
    }
  }
}

template <int kVector, int kBlocks, int kTokens>
inline void step(const uint8_t *chunk, size_t block_bytes, const Tables &t, const int32_t *x,
                 __m512i (&sum)[kBlocks][kTokens]) {
  __m512i even[kBlocks], odd[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    const uint8_t *own = chunk + b * block_bytes;
    look_up<kVector>(own, _mm512_loadu_si512(own + 256), t, &even[b], &odd[b]);
  }
  multiply_codes<kBlocks, kTokens>(even, x + 6 * kVector * kTokens, sum);
  multiply_codes<kBlocks, kTokens>(odd, x + (6 * kVector + 3) * kTokens, sum);
}

template <int kBlocks, int kTokens>
inline void tile(const uint8_t *codes, int chunks, const int32_t *x, int32_t *sums) {
  const Tables t;
  size_t block_bytes = (size_t)chunks * halo::kTernaryChunk;
  __m512i sum[kBlocks][kTokens];
  for (int b = 0; b < kBlocks; ++b)
    for (int k = 0; k < kTokens; ++k) sum[b][k] = _mm512_setzero_si512();
  for (int c = 0; c < chunks; ++c, codes += halo::kTernaryChunk, x += 24 * kTokens) {
    for (int b = 0; b < kBlocks; ++b)  // the same place of the next blocks
      for (int line = 0; line < 5; ++line)
        _mm_prefetch((const char *)codes + (b + kBlocks) * block_bytes + 64 * line, _MM_HINT_T1);
    step<0, kBlocks, kTokens>(codes, block_bytes, t, x, sum);
    step<1, kBlocks, kTokens>(codes, block_bytes, t, x, sum);
    step<2, kBlocks, kTokens>(codes, block_bytes, t, x, sum);
    step<3, kBlocks, kTokens>(codes, block_bytes, t, x, sum);
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int k = 0; k < kTokens; ++k) _mm512_storeu_si512(sums + (b * kTokens + k) * 16, sum[b][k]);
}

const int kPair = 2;  // blocks of rows that share one pass over the activations

// Levels 0..63 of four groups of columns.
inline void levels(const uint8_t *chunk, __m512i (&u)[4]) {
  const __m512i nibble = _mm512_set1_epi8(0x3c), two = _mm512_set1_epi8(3);
  __m512i rest = _mm512_loadu_si512(chunk + 128);
  for (int half = 0; half < 2; ++half) {
    __m512i high = _mm512_loadu_si512(chunk + 64 * half);
    u[2 * half] = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(high, 2), nibble),
                                  _mm512_and_si512(_mm512_srli_epi16(rest, 4 * half), two));
    u[2 * half + 1] = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi16(high, 2), nibble),
                                      _mm512_and_si512(_mm512_srli_epi16(rest, 4 * half + 2), two));
  }
}

template <int kVectors>
void coarse_tile(const uint8_t *tiles, int chunks, const int32_t *x, int32_t *sums) {
  __m512i sum[2][kVectors];
  for (auto &parity : sum)
    for (__m512i &s : parity) s = _mm512_setzero_si512();
  for (int c = 0; c < chunks; ++c, tiles += halo::kCoarseChunk, x += 4 * kVectors) {
    for (int line = 0; line < 3; ++line) _mm_prefetch((const char *)tiles + kAhead + 64 * line, _MM_HINT_T1);
    __m512i u[4];
    levels(tiles, u);
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[g % 2][v] = _mm512_dpbusd_epi32(sum[g % 2][v], u[g], four(x + g * kVectors + v));
  }
  for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + 16 * v, _mm512_add_epi32(sum[0][v], sum[1][v]));
}

}  // namespace

#include "lanes.inc.h"
#include "attention_avx512.inc.h"
#include "walk.inc.h"

#endif
