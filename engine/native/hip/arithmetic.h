// The float arithmetic of a block of threads, to the last bit that of the CPU's paths: cpu/lanes.inc.h says it for 16
// lanes of a vector, engine/arithmetic.py in NumPy. Device code.
#pragma once
#include "gpu.h"

namespace halo {

const int kScratchBytes = 256;  // of a block's shared memory: for its sums and maxima
const uint32_t kInfinityBits = 0x7f800000u;
const uint32_t kTooLargeBits = 0x53800000u;  // 2^40: no sum of the attention can overflow below

GPU_DEVICE bool finite(float x) { return (bits_of(x) & 0x7fffffffu) < kInfinityBits; }
GPU_DEVICE uint32_t size_bits(float x) { return bits_of(x) & 0x7fffffffu; }

// The 16 lanes of a half-wave as a tree: l + 8, l + 4, l + 2, l + 1. Every lane of it gets the sum.
GPU_DEVICE float add_lanes(float x) {
  for (int half = 8; half; half /= 2) x = x + shuffle_xor(x, half);
  return x;
}

// Of all threads of the block. `scratch` is shared, a word for each wave; the block meets twice.
template <int kThreads>
GPU_DEVICE uint32_t block_max(uint32_t x, uint32_t *scratch) {
  x = wave_max(x);
  if (lane_id() == 0) scratch[wave_id()] = x;
  sync_block();
  for (int w = 0; w < kThreads / kWave; ++w) x = scratch[w] > x ? scratch[w] : x;
  sync_block();
  return x;
}

template <int kThreads>
GPU_DEVICE int block_sum(int x, uint32_t *scratch) {
  x = wave_sum(x);
  if (lane_id() == 0) scratch[wave_id()] = (uint32_t)x;
  sync_block();
  int sum = 0;
  for (int w = 0; w < kThreads / kWave; ++w) sum += (int)scratch[w];
  sync_block();
  return sum;
}

// e^x for x <= 0: cpu/lanes.inc.h, vexp.
GPU_DEVICE float exp_of(float x) {
  x = x > -86.0f ? x : -86.0f;
  const float magic = 12582912.0f;
  float t = fused(x, 1.44269504f, magic), n = t - magic;
  float r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r);
  return float_of(bits_of(p + 1.0f) + (bits_of(t) << 23));
}

// relu(gate)^2 * up, or silu(gate) * up.
GPU_DEVICE float gated(float gate, float up, int activation) {
  float positive = gate > 0.0f ? gate : 0.0f;
  if (activation == 0) return positive * positive * up;
  float negative = gate - positive, e = exp_of(negative - positive);
  return (positive + negative * e) / (1.0f + e) * up;
}

// What a product gives: see `finish` in cpu/lanes.inc.h.
GPU_DEVICE float scaled(int sum, int offset, float weight_scale, float x_scale) {
  return (float)(sum - offset) * weight_scale / x_scale;
}

struct RowFacts {
  float scale;
  int sum;      // of the int8 values
  bool finite;
};

// 1 / sqrt(mean(x^2) + eps) of a row of `filled` floats in shared memory, of which n count (the rest are 0). The first
// wave works, its halves alike; the block meets once, so that `result` (shared) may be read. Each lane's chain of fused
// operations is what this takes, so the next elements are read while it works.
GPU_DEVICE void inverse_rms(const float *row, int n, int filled, float eps, float *result) {
  if (wave_id() == 0) {
    const int kAtOnce = 8;
    const float *own = row + lane_id() % 16;
    const int steps = filled / 16;
    float sum = 0.0f, next[kAtOnce];
    GPU_UNROLL
    for (int k = 0; k < kAtOnce; ++k) next[k] = k < steps ? own[16 * k] : 0.0f;
    for (int i = 0; i < steps; i += kAtOnce) {
      float now[kAtOnce];
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) now[k] = next[k];
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) next[k] = i + kAtOnce + k < steps ? own[16 * (i + kAtOnce + k)] : 0.0f;
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum = fused(now[k], now[k], sum);  // a zero adds nothing
    }
    sum = add_lanes(sum);
    if (thread_id() == 0) *result = 1.0f / root(sum / (float)n + eps);
  }
  sync_block();
}

// x through its RMSNorm (norm null: none) into `row`, shared, filled up to 16 floats; the largest size's bits are
// returned. x is filled up with zeros to 16. scratch: 33 words, shared.
template <int kThreads>
GPU_DEVICE uint32_t normed_row(const float *x, const float *norm, int n, float eps, float *row, uint32_t *scratch) {
  const int filled = (n + 15) / 16 * 16;
  for (int i = thread_id(); i < filled / 4; i += kThreads) ((uint4 *)row)[i] = ((const uint4 *)x)[i];
  sync_block();
  uint32_t most = 0;
  float inverse = 1.0f;
  if (norm) {
    inverse_rms(row, n, filled, eps, (float *)scratch + 32);
    inverse = ((float *)scratch)[32];
  }
  for (int i = thread_id(); i < filled; i += kThreads) {
    float y = norm ? row[i] * inverse * norm[i] : row[i];
    row[i] = y;
    uint32_t size = size_bits(y);
    most = size > most ? size : most;
  }
  return block_max<kThreads>(most, scratch);
}

GPU_DEVICE uint32_t quantized_byte(float y, float scale) {
  float v = nearest(y * scale);
  v = v > 127.0f ? 127.0f : v < -128.0f ? -128.0f : v;
  return (uint32_t)((int)v & 255);
}

GPU_DEVICE float quantum(uint32_t bits) {
  const float most = bits < kInfinityBits ? float_of(bits) : 1.0f;
  return 127.0f / (most > 1e-5f ? most : 1e-5f);
}

// A row in shared memory for its sum of squares: the elements of one lane of the 16 behind one another, `lane_row` apart,
// so that a thread reads four links of its chain at once; 4 more than a multiple of 32, so that eight lanes read all banks.
GPU_DEVICE int lane_row(int filled) { return (filled / 16 + 31) / 32 * 32 + 4; }

GPU_DEVICE float with_squares(float sum, const uint4 &four) {
  sum = fused(float_of(four.x), float_of(four.x), sum);
  sum = fused(float_of(four.y), float_of(four.y), sum);
  sum = fused(float_of(four.z), float_of(four.z), sum);
  return fused(float_of(four.w), float_of(four.w), sum);
}

// inverse_rms() of such a row, whose elements from filled / 16 to the next four are 0 in every lane. The first wave works,
// and reads what comes next while its chain runs.
GPU_DEVICE void inverse_rms_of_lanes(const float *lanes, int n, int filled, float eps, float *result) {
  if (wave_id() == 0) {
    const int kAtOnce = 4;  // fours
    const uint4 *own = (const uint4 *)(lanes + lane_id() % 16 * lane_row(filled));
    const int fours = (filled / 16 + 3) / 4, whole = fours / kAtOnce * kAtOnce;
    float sum = 0.0f;
    uint4 next[kAtOnce];
    GPU_UNROLL
    for (int k = 0; k < kAtOnce; ++k) next[k] = own[k < fours ? k : 0];
    for (int i = 0; i < whole; i += kAtOnce) {
      uint4 now[kAtOnce];
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) now[k] = next[k];
      const int behind = i + 2 * kAtOnce <= whole ? i + kAtOnce : 0;  // of no use at the end
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) next[k] = own[behind + k];
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) sum = with_squares(sum, now[k]);
    }
    for (int i = whole; i < fours; ++i) sum = with_squares(sum, own[i]);
    sum = add_lanes(sum);
    if (thread_id() == 0) *result = 1.0f / root(sum / (float)n + eps);
  }
  sync_block();
}

GPU_DEVICE void put_in_lanes(float *lanes, int filled, int four, const uint4 &v) {
  const int lane = 4 * four % 16, at = 4 * four / 16, row = lane_row(filled);
  lanes[lane * row + at] = float_of(v.x);
  lanes[(lane + 1) * row + at] = float_of(v.y);
  lanes[(lane + 2) * row + at] = float_of(v.z);
  lanes[(lane + 3) * row + at] = float_of(v.w);
}

// Bytes of shared memory that quantized_row() wants for a row of n.
GPU_HOST_DEVICE size_t row_bytes_of(int n) {
  const int filled = (n + 15) / 16 * 16;
  return (size_t)64 * ((filled / 16 + 31) / 32 * 32 + 4);
}

// The bytes of a four times `scale`, none of which is above 127 (quantum() sees to it): adding 1.5 * 2^23 rounds to the
// nearest whole number, ties to even, and leaves it in the lowest bits.
GPU_DEVICE uint32_t quantized_four(const uint4 &y, float scale) {
  const float magic = 12582912.0f;
  const uint32_t a = bits_of(float_of(y.x) * scale + magic), b = bits_of(float_of(y.y) * scale + magic);
  const uint32_t c = bits_of(float_of(y.z) * scale + magic), d = bits_of(float_of(y.w) * scale + magic);
  return pick_bytes(pick_bytes(a, b, 0x00000400u), pick_bytes(c, d, 0x00000400u), 0x05040100u);
}

GPU_DEVICE uint4 normed_four(const uint4 &x, float inverse, const uint4 &norm) {
  return make_uint4(bits_of(float_of(x.x) * inverse * float_of(norm.x)), bits_of(float_of(x.y) * inverse * float_of(norm.y)),
                    bits_of(float_of(x.z) * inverse * float_of(norm.z)), bits_of(float_of(x.w) * inverse * float_of(norm.w)));
}

GPU_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest size of a four's elements, as bits.
GPU_DEVICE uint32_t largest_of(const uint4 &y) {
  return larger(larger(y.x & 0x7fffffffu, y.y & 0x7fffffffu), larger(y.z & 0x7fffffffu, y.w & 0x7fffffffu));
}

// quantized_row() for rows of which no thread has more than kFours fours: those stay in registers. norm_four(g, i): the
// norm's weights of four number i, which is the thread's number g.
template <int kThreads, int kFours, class NormFour>
GPU_DEVICE RowFacts quantized_fours(const float *x, bool normed, NormFour norm_four, int n, float eps, int padded, float *row,
                                    int8_t *q, uint32_t *scratch) {
  const int filled = (n + 15) / 16 * 16, waves = kThreads / kWave;
  uint4 own[kFours];
  GPU_UNROLL
  for (int g = 0; g < kFours; ++g) {
    const int i = thread_id() + g * kThreads;
    own[g] = 4 * i < filled ? ((const uint4 *)x)[i] : make_uint4(0, 0, 0, 0);
  }
  if (normed) {
    GPU_UNROLL
    for (int g = 0; g < kFours; ++g)
      if (4 * (thread_id() + g * kThreads) < (filled + 63) / 64 * 64) put_in_lanes(row, filled, thread_id() + g * kThreads, own[g]);
    sync_block();
    inverse_rms_of_lanes(row, n, filled, eps, (float *)scratch + 2 * waves);
    const float inverse = ((float *)scratch)[2 * waves];
    GPU_UNROLL
    for (int g = 0; g < kFours; ++g) {
      const int i = thread_id() + g * kThreads;
      if (4 * i < filled) own[g] = normed_four(own[g], inverse, norm_four(g, i));
    }
  }
  uint32_t most = 0;
  GPU_UNROLL
  for (int g = 0; g < kFours; ++g) most = larger(most, largest_of(own[g]));
  most = wave_max(most);
  if (lane_id() == 0) scratch[wave_id()] = most;
  sync_block();
  most = wave_max(scratch[lane_id() % waves]);
  const float scale = quantum(most);
  const bool is_finite = most < kInfinityBits;
  int sum = 0;
  GPU_UNROLL
  for (int g = 0; g < kFours; ++g) {
    const int i = thread_id() + g * kThreads;
    if (4 * i >= padded) continue;
    const uint32_t word = is_finite ? quantized_four(own[g], scale) : 0;
    ((uint32_t *)q)[i] = word;  // what lies behind the row has been 0 throughout
    sum = dot4_ss(word, 0x01010101u, sum);
  }
  for (int i = thread_id() + kFours * kThreads; 4 * i < padded; i += kThreads) ((uint32_t *)q)[i] = 0;
  sum = wave_sum(sum);
  if (lane_id() == 0) scratch[waves + wave_id()] = (uint32_t)sum;
  sync_block();
  sum = wave_sum(lane_id() < waves ? (int)scratch[waves + lane_id()] : 0);
  return {scale, sum, is_finite};
}

// Whether quantized_fours() takes a row with so many fours for each thread.
template <int kThreads, int kFours>
GPU_HOST_DEVICE bool is_short_row(int n) {
  return (n + 15) / 16 * 16 <= 4 * kFours * kThreads - 64;
}

// quantized_row() for the others.
template <int kThreads>
GPU_DEVICE RowFacts quantized_long(const float *x, const float *norm, int n, float eps, int padded, float *row, int8_t *q,
                                   uint32_t *scratch) {
  const int filled = (n + 15) / 16 * 16;
  const uint32_t bits = normed_row<kThreads>(x, norm, n, eps, row, scratch);
  const bool is_finite = bits < kInfinityBits;
  const float scale = quantum(bits);
  int sum = 0;
  for (int i = thread_id(); i < padded / 4; i += kThreads) {
    uint32_t word = 0;
    if (4 * i < filled && is_finite)
      for (int b = 0; b < 4; ++b) word |= quantized_byte(row[4 * i + b], scale) << 8 * b;
    ((uint32_t *)q)[i] = word;
    sum = dot4_ss(word, 0x01010101u, sum);
  }
  sum = block_sum<kThreads>(sum, scratch);
  return {scale, sum, is_finite};
}

// x as normed_row() has it, and then quantised: int8 in q (any memory), zeros from n to `padded` (a multiple of 4). The
// block has met when it returns. scratch: 2 words a wave, and one.
template <int kThreads>
GPU_DEVICE RowFacts quantized_row(const float *x, const float *norm, int n, float eps, int padded, float *row, int8_t *q,
                                  uint32_t *scratch) {
  const auto norm_four = [&](int, int i) { return ((const uint4 *)norm)[i]; };
  if (is_short_row<kThreads, 2>(n))
    return quantized_fours<kThreads, 2>(x, norm, norm_four, n, eps, padded, row, q, scratch);
  if (is_short_row<kThreads, 4>(n))
    return quantized_fours<kThreads, 4>(x, norm, norm_four, n, eps, padded, row, q, scratch);
  return quantized_long<kThreads>(x, norm, n, eps, padded, row, q, scratch);
}

}  // namespace halo
