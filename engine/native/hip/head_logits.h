// The full output head: all logits of some tokens, in one pass over the rows of full precision. Device code.
#pragma once
#include "head_exact.h"

namespace halo {

// 8 weights from element i on.
template <bool kBf16>
struct HeadEight {
  uint4 piece[kBf16 ? 1 : 2];
  GPU_DEVICE void read(HeadEight &w, const uint8_t *row, int i) {
    GPU_UNROLL
    for (int p = 0; p < (kBf16 ? 1 : 2); ++p) w.piece[p] = load_once((const uint4 *)(row + i * (kBf16 ? 2 : 4)) + p);
  }
  GPU_DEVICE void floats(const HeadEight &w, float (&out)[8]) {
    const uint32_t words[4] = {w.piece[0].x, w.piece[0].y, w.piece[0].z, w.piece[0].w};
    const uint4 &more = w.piece[kBf16 ? 0 : 1];
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (kBf16) {
        out[2 * i] = float_of(words[i] << 16);
        out[2 * i + 1] = float_of(words[i] & 0xffff0000u);
      } else {
        out[i] = float_of(words[i]);
        out[4 + i] = float_of(i == 0 ? more.x : i == 1 ? more.y : i == 2 ? more.z : more.w);
      }
    }
  }
};

// The 8 lanes of a thread and those of its neighbour as the tree of 16.
GPU_DEVICE float head_tree(float (&lanes)[8]) {
  GPU_UNROLL
  for (int l = 0; l < 8; ++l) lanes[l] = lanes[l] + shuffle_xor(lanes[l], 1);
  GPU_UNROLL
  for (int half = 4; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
  return lanes[0];
}

template <int kTokens, bool kBf16>
GPU_DEVICE void head_multiply(const HeadEight<kBf16> &weights, const float *x, int filled, float (&sums)[kTokens][8]) {
  float w[8];
  HeadEight<kBf16>::floats(weights, w);
  GPU_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    const uint4 low = ((const uint4 *)(x + t * filled))[0], high = ((const uint4 *)(x + t * filled))[1];
    sums[t][0] = fused(w[0], float_of(low.x), sums[t][0]);
    sums[t][1] = fused(w[1], float_of(low.y), sums[t][1]);
    sums[t][2] = fused(w[2], float_of(low.z), sums[t][2]);
    sums[t][3] = fused(w[3], float_of(low.w), sums[t][3]);
    sums[t][4] = fused(w[4], float_of(high.x), sums[t][4]);
    sums[t][5] = fused(w[5], float_of(high.y), sums[t][5]);
    sums[t][6] = fused(w[6], float_of(high.z), sums[t][6]);
    sums[t][7] = fused(w[7], float_of(high.w), sums[t][7]);
  }
}

// Two threads a row, each with 8 of the 16 lanes; a wave takes 16 rows.
template <int kTokens, bool kBf16>
GPU_DEVICE void head_logits(const HeadLogitsArgs &a) {
  const int kAtOnce = 4;  // steps of 16 elements on their way
  let_next_start();
  wait_for_previous();
  float *x = (float *)shared_memory();
  const int filled = head_filled(a.n), mine = lane_id() % 2 * 8;
  for (int t = 0; t < kTokens; ++t)
    head_read_row(a.kept + (size_t)(t < a.count ? t : a.count - 1) * a.kept_stride, a.n, x + t * filled);
  sync_block();
  const int waves = block_count() * kHeadWaves;
  bool bad = false;
  for (int first = (block_id() * kHeadWaves + wave_id()) * 16; first < a.vocab; first += waves * 16) {
    const int id = first + lane_id() / 2;
    const uint8_t *row = a.rows.data + (size_t)(id < a.vocab ? id : a.vocab - 1) * a.rows.row_bytes;
    float sums[kTokens][8] = {};
    int i = mine;
    for (; i + 16 * (kAtOnce - 1) < filled; i += 16 * kAtOnce) {
      HeadEight<kBf16> w[kAtOnce];
      GPU_UNROLL
      for (int j = 0; j < kAtOnce; ++j) HeadEight<kBf16>::read(w[j], row, i + 16 * j);
      GPU_UNROLL
      for (int j = 0; j < kAtOnce; ++j) head_multiply<kTokens, kBf16>(w[j], x + i + 16 * j, filled, sums);
    }
    for (; i < filled; i += 16) {
      HeadEight<kBf16> w;
      HeadEight<kBf16>::read(w, row, i);
      head_multiply<kTokens, kBf16>(w, x + i, filled, sums);
    }
    GPU_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      const float logit = head_tree(sums[t]);
      if (id >= a.vocab || t >= a.count) continue;
      bad = bad || !finite(logit);
      if (t % 2 == lane_id() % 2) a.logits[(size_t)t * a.vocab + id] = logit;
    }
  }
  if (bad) atomic_or(a.status, kNotFinite);
}

GPU_KERNEL(kHeadThreads) halo_head_logits_1_bf16(HeadLogitsArgs a) { head_logits<1, true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_logits_4_bf16(HeadLogitsArgs a) { head_logits<4, true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_logits_8_bf16(HeadLogitsArgs a) { head_logits<8, true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_logits_1_f32(HeadLogitsArgs a) { head_logits<1, false>(a); }
GPU_KERNEL(kHeadThreads) halo_head_logits_4_f32(HeadLogitsArgs a) { head_logits<4, false>(a); }
GPU_KERNEL(kHeadThreads) halo_head_logits_8_f32(HeadLogitsArgs a) { head_logits<8, false>(a); }

}  // namespace halo
