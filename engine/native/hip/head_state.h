// The hidden states that the output head takes: the final norm, and a row in 16 bits for the coarse pass. Device code.
#pragma once
#include "arithmetic.h"
#include "head_launch.h"
#include "kernels.h"

namespace halo {

const int kHeadThreads = 256;
const int kHeadWaves = kHeadThreads / kWave;
const int kHeadScratch = 256;  // bytes of block-wide sums

GPU_DEVICE int head_filled(int n) { return (n + 15) / 16 * 16; }

// What all threads of a block make of a row together.
struct HeadSums {
  float length, missed;  // squares
  int high, low;
};

GPU_DEVICE HeadSums head_sums(HeadSums x, HeadSums *scratch) {
  for (int half = 16; half; half /= 2) {
    x.length += shuffle_xor(x.length, half);
    x.missed += shuffle_xor(x.missed, half);
    x.high += shuffle_xor(x.high, half);
    x.low += shuffle_xor(x.low, half);
  }
  if (lane_id() == 0) scratch[wave_id()] = x;
  sync_block();
  x = scratch[0];
  for (int w = 1; w < kHeadWaves; ++w) {
    x.length += scratch[w].length;
    x.missed += scratch[w].missed;
    x.high += scratch[w].high;
    x.low += scratch[w].low;
  }
  sync_block();
  return x;
}

// x as step * (256 high + low), as Head::coarse_token of the CPU takes it; store(i, high, low) gets word i of either.
//
// The lengths are summed in float32 and in units of the step: with z = fl(x / step), |z| <= 32,001, and v = round(z),
// z - v is exact and x = step z (1 + d), |d| <= 2^-24. So |x'| <= step (|z| + |z - v|) and
// |m| <= step (|z - v| + 2^-24 |z|), the latter part of which is in the 10 instead of 8 below. These sums and their
// roots are off by less than 1e-4 in all: 1.002 has room for that beside what docs/exact-head.md asks of its 1.001.
template <class Store>
GPU_DEVICE HeadToken head_token(const float *row, int n, int steps, uint32_t most_bits, float *scratch, Store store) {
  const float most = most_bits < kInfinityBits ? float_of(most_bits) : 0.0f;
  const bool some = most > 1e-30f;
  const float step = some ? most / 32000.0f : 0.0f;
  const int filled = head_filled(n);
  HeadSums sums = {0.0f, 0.0f, 0, 0};
  for (int i = thread_id(); i < steps * (kHeadStepCols / 4); i += kHeadThreads) {
    uint32_t high_word = 0, low_word = 0;
    if (some && 4 * i < filled) {
      for (int b = 0; b < 4; ++b) {
        const float z = row[4 * i + b] / step, v = nearest(z);
        sums.length = fused(z, z, sums.length);
        sums.missed = fused(z - v, z - v, sums.missed);
        const int value = (int)v, high = (value + 128) >> 8, low = value - 256 * high;
        sums.high += high, sums.low += low;
        high_word |= (uint32_t)(high & 255) << 8 * b;
        low_word |= (uint32_t)(low & 255) << 8 * b;
      }
    }
    store(i, high_word, low_word);
  }
  sums = head_sums(sums, (HeadSums *)scratch);
  HeadToken token = {};
  token.high_sum = sums.high;
  token.low_sum = sums.low;
  token.half_step = step / 2;
  const float length = root(sums.length), missed = root(sums.missed), width = root((float)n);
  const float chain = (float)(filled / 16 + 10) * 5.9604645e-8f;  // 2^-24
  if (!some) {  // without a step nothing is known but the length
    token.by_norm = most * width * (1.0f + chain) * 1.002f;
    return token;
  }
  const float taken = step * (length + missed);
  const float floats = 1.9073487e-6f * (taken + 128.0f * step * width);  // 2^-19
  token.by_error = (taken + floats) * 1.002f;
  token.by_norm = (step * missed + chain * (step * length) + floats) * 1.002f;
  return token;
}

// Token t through the final norm into `row` (shared); block `writer` keeps it.
template <class Store>
GPU_DEVICE HeadToken head_normed(const HeadNormArgs &a, int t, bool writer, float *row, float *scratch, Store store) {
  const int from = a.wanted ? a.wanted[t] : t;
  const float *x = a.x + (size_t)from * a.stride;
  const uint32_t most = normed_row<kHeadThreads>(x, a.norm, a.n, a.eps, row, (uint32_t *)scratch);
  if (writer) {
    for (int i = thread_id(); i < head_filled(a.n); i += kHeadThreads) a.kept[(size_t)t * a.kept_stride + i] = row[i];
    if (thread_id() == 0 && most >= kInfinityBits) atomic_or(a.status, kNotFinite);
  }
  return head_token(row, a.n, a.steps, most, scratch, store);
}

GPU_KERNEL(kHeadThreads) halo_head_norm(HeadNormArgs a) {
  let_next_start();
  wait_for_previous();
  float *scratch = (float *)shared_memory();
  const int t = block_id(), words = a.steps * (kHeadStepCols / 4);
  uint32_t *high = (uint32_t *)a.parts + (size_t)2 * words * t;
  const auto store = [&](int i, uint32_t high_word, uint32_t low_word) {
    if (!a.parts) return;
    high[i] = high_word;
    high[words + i] = low_word;
  };
  const HeadToken token = head_normed(a, t, true, scratch + kHeadScratch / 4, scratch, store);
  if (thread_id() == 0 && a.parts) a.tokens[t] = token;
}

}  // namespace halo
