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

// For rows of which no thread has more than this many fours.
const int kFours = 4;

// A row in shared memory for its sum of squares: the elements of one lane of the 16 behind one another, `lane_row` apart,
// so that a thread reads four links of its chain at once; 4 more than a multiple of 32, so that eight lanes read all banks.
GPU_DEVICE int lane_row(int filled) { return (filled / 16 + 31) / 32 * 32 + 4; }

// inverse_rms() of such a row, whose elements from filled / 16 to the next four are 0 in every lane. The first wave works.
GPU_DEVICE void inverse_rms_of_lanes(const float *lanes, int n, int filled, float eps, float *result) {
  if (wave_id() == 0) {
    const int kAtOnce = 4;  // fours
    const uint4 *own = (const uint4 *)(lanes + lane_id() % 16 * lane_row(filled));
    const int fours = (filled / 16 + 3) / 4, whole = fours / kAtOnce * kAtOnce;
    float sum = 0.0f;
    uint4 now[kAtOnce];
    for (int i = 0; i < whole; i += kAtOnce) {
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) now[k] = own[i + k];
      GPU_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        sum = fused(float_of(now[k].x), float_of(now[k].x), sum);
        sum = fused(float_of(now[k].y), float_of(now[k].y), sum);
        sum = fused(float_of(now[k].z), float_of(now[k].z), sum);
        sum = fused(float_of(now[k].w), float_of(now[k].w), sum);
      }
    }
    for (int i = whole; i < fours; ++i) {
      now[0] = own[i];
      sum = fused(float_of(now[0].x), float_of(now[0].x), sum);
      sum = fused(float_of(now[0].y), float_of(now[0].y), sum);
      sum = fused(float_of(now[0].z), float_of(now[0].z), sum);
      sum = fused(float_of(now[0].w), float_of(now[0].w), sum);
    }
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

GPU_DEVICE uint4 four_of_lanes(const float *lanes, int filled, int four) {
  const int lane = 4 * four % 16, at = 4 * four / 16, row = lane_row(filled);
  return make_uint4(bits_of(lanes[lane * row + at]), bits_of(lanes[(lane + 1) * row + at]),
                    bits_of(lanes[(lane + 2) * row + at]), bits_of(lanes[(lane + 3) * row + at]));
}

// quantized_row() for short rows: each thread keeps its part in registers, but not while the sum of squares is made, whose
// chain is as fast as the first wave's registers let it read ahead.
template <int kThreads>
GPU_DEVICE RowFacts quantized_fours(const float *x, const float *norm, int n, float eps, int padded, float *row, int8_t *q,
                                    uint32_t *scratch) {
  const int filled = (n + 15) / 16 * 16, waves = kThreads / kWave;
  uint4 own[kFours];
  if (norm) {
    GPU_UNROLL
    for (int g = 0; g < kFours; ++g) {
      const int i = thread_id() + g * kThreads;
      own[g] = 4 * i < filled ? ((const uint4 *)x)[i] : make_uint4(0, 0, 0, 0);
    }
    GPU_UNROLL
    for (int g = 0; g < kFours; ++g)
      if (4 * (thread_id() + g * kThreads) < (filled + 63) / 64 * 64) put_in_lanes(row, filled, thread_id() + g * kThreads, own[g]);
    sync_block();
    inverse_rms_of_lanes(row, n, filled, eps, (float *)scratch + 2 * waves);
    const float inverse = ((float *)scratch)[2 * waves];
    GPU_UNROLL
    for (int g = 0; g < kFours; ++g) {
      const int i = thread_id() + g * kThreads;
      own[g] = make_uint4(0, 0, 0, 0);
      if (4 * i < filled) {
        const uint4 x4 = four_of_lanes(row, filled, i), w4 = ((const uint4 *)norm)[i];
        own[g].x = bits_of(float_of(x4.x) * inverse * float_of(w4.x));
        own[g].y = bits_of(float_of(x4.y) * inverse * float_of(w4.y));
        own[g].z = bits_of(float_of(x4.z) * inverse * float_of(w4.z));
        own[g].w = bits_of(float_of(x4.w) * inverse * float_of(w4.w));
      }
    }
  } else {
    GPU_UNROLL
    for (int g = 0; g < kFours; ++g) {
      const int i = thread_id() + g * kThreads;
      own[g] = 4 * i < filled ? ((const uint4 *)x)[i] : make_uint4(0, 0, 0, 0);
    }
  }
  uint32_t most = 0;
  GPU_UNROLL
  for (int g = 0; g < kFours; ++g) {
    const uint32_t sizes[4] = {own[g].x & 0x7fffffffu, own[g].y & 0x7fffffffu, own[g].z & 0x7fffffffu, own[g].w & 0x7fffffffu};
    GPU_UNROLL
    for (int k = 0; k < 4; ++k) most = sizes[k] > most ? sizes[k] : most;
  }
  most = wave_max(most);
  if (lane_id() == 0) scratch[wave_id()] = most;
  sync_block();
  GPU_UNROLL
  for (int w = 0; w < waves; ++w) most = scratch[w] > most ? scratch[w] : most;
  const float scale = quantum(most);
  const bool is_finite = most < kInfinityBits;
  int sum = 0;
  GPU_UNROLL
  for (int g = 0; g < kFours; ++g) {
    const int i = thread_id() + g * kThreads;
    uint32_t word = quantized_byte(float_of(own[g].x), scale) | quantized_byte(float_of(own[g].y), scale) << 8 |
                    quantized_byte(float_of(own[g].z), scale) << 16 | quantized_byte(float_of(own[g].w), scale) << 24;
    if (!is_finite) word = 0;
    if (4 * i < padded) ((uint32_t *)q)[i] = word;  // what lies behind the row has been 0 throughout
    sum = dot4_ss(word, 0x01010101u, sum);
  }
  for (int i = thread_id() + kFours * kThreads; 4 * i < padded; i += kThreads) ((uint32_t *)q)[i] = 0;
  sum = wave_sum(sum);
  if (lane_id() == 0) scratch[waves + wave_id()] = (uint32_t)sum;
  sync_block();
  sum = 0;
  GPU_UNROLL
  for (int w = 0; w < waves; ++w) sum += (int)scratch[waves + w];
  return {scale, sum, is_finite};
}

// x as normed_row() has it, and then quantised: int8 in q (any memory), zeros from n to `padded` (a multiple of 4). The
// block has met when it returns. scratch: 2 words a wave, and one.
template <int kThreads>
GPU_DEVICE RowFacts quantized_row(const float *x, const float *norm, int n, float eps, int padded, float *row, int8_t *q,
                                  uint32_t *scratch) {
  const int filled = (n + 15) / 16 * 16;
  if (filled <= 4 * kFours * kThreads - 64) return quantized_fours<kThreads>(x, norm, n, eps, padded, row, q, scratch);
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

}  // namespace halo
