// The coarse pass of the output head for 8 or 16 tokens at once, by the matrix units. Device code.
#pragma once
#include "head_coarse.h"
#include "mma.h"

namespace halo {

// Reads the parts of all tokens into shared memory; tokens beyond the last are the last.
template <int kTokens>
GPU_DEVICE void head_stage(const HeadCoarseArgs &a, const HeadRoom<kTokens> &room) {
  const int words = a.own.steps * (kHeadStepCols / 16);  // of 16 bytes, of one vector
  for (int i = thread_id(); i < 2 * kTokens * words; i += kHeadThreads) {
    const int v = i / words, at = i % words, t = v / 2 < a.count ? v / 2 : a.count - 1;
    uint8_t *to = room.x + (size_t)(at / 4) * HeadChunk<kTokens>::kBytes + HeadChunk<kTokens>::kVector * v;
    ((uint4 *)to)[at % 4] = ((const uint4 *)a.parts)[(size_t)(2 * t + v % 2) * words + at];
  }
  if (thread_id() < kTokens) room.tokens[thread_id()] = a.tokens[thread_id() < a.count ? thread_id() : a.count - 1];
  sync_block();
}

// The product of 16 rows, two tiles, with 2 kTokens vectors; 2 t and 2 t + 1 are high and low of token t. It holds the
// weights of a step, and gets those of the next one while it multiplies.
#if defined(HALO_MMA_SYNC)

// Lane 4 g + t holds row g of either tile and part t of a step's columns, and sums of tokens 4 i + t.
template <int kTokens>
struct HeadProduct {
  static const int kOwn = kTokens / 4;  // tokens of which a lane gets results
  static const int kMasks = 3;          // lanes of one token differ in these
  HeadLevels w[2];
  int acc[kOwn][4];

  GPU_DEVICE void load(HeadProduct &p, const uint4 *from, size_t tile_words) {
    from += lane_id() / 4 + lane_id() % 4 * 8;
    head_load(from, p.w[0]);
    head_load(from + tile_words, p.w[1]);
  }
  GPU_DEVICE void step(HeadProduct &p, const uint8_t *x, const uint4 *next, size_t tile_words) {
    const HeadLevels w[2] = {p.w[0], p.w[1]};
    load(p, next, tile_words);
    x += lane_id() % 4 * HeadChunk<kTokens>::kBytes + lane_id() / 4 * HeadChunk<kTokens>::kVector;
    GPU_UNROLL
    for (int q = 0; q < 4; ++q) {
      const uint32_t a[4] = {head_levels(w[0], 4 * q), head_levels(w[1], 4 * q), head_levels(w[0], 4 * q + 1),
                             head_levels(w[1], 4 * q + 1)};
      const uint32_t b[4] = {head_levels(w[0], 4 * q + 2), head_levels(w[1], 4 * q + 2), head_levels(w[0], 4 * q + 3),
                             head_levels(w[1], 4 * q + 3)};
      GPU_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const uint4 v = ((const uint4 *)(x + 8 * i * HeadChunk<kTokens>::kVector))[q];
        mma::multiply8<false>(p.acc[i], a, v.x, v.y);
        mma::multiply8<false>(p.acc[i], b, v.z, v.w);
      }
    }
  }
  // give(i, token, row of the 16, high, low), rows rising.
  template <class Give>
  GPU_DEVICE void results(const HeadProduct &p, Give give) {
    GPU_UNROLL
    for (int r = 0; r < 2; ++r) {
      GPU_UNROLL
      for (int i = 0; i < kOwn; ++i)
        give(i, token(i), 8 * r + lane_id() / 4, p.acc[i][2 * r], p.acc[i][2 * r + 1]);
    }
  }
  GPU_DEVICE void clear(HeadProduct &p) {
    GPU_UNROLL
    for (int i = 0; i < 4 * kOwn; ++i) p.acc[i / 4][i % 4] = 0;
  }
  GPU_DEVICE bool first_of_token() { return lane_id() < 4; }
  GPU_DEVICE int token(int i) { return 4 * i + lane_id() % 4; }
  GPU_DEVICE int mask(int m) { return 4 << m; }
};

#else

// Lane l holds row l % 16 of the 16, all four parts of a step one after the other, and sums of vector l % 16 of each
// 16; even and odd lanes then share the rows of a token.
template <int kTokens>
struct HeadProduct {
  static const int kOwn = kTokens / 8, kMasks = 2;
  HeadLevels w[4];
  int acc[kOwn][8];

  GPU_DEVICE const uint4 *place(const uint4 *from, size_t tile_words) {
    return from + lane_id() % 16 / 8 * tile_words + lane_id() % 8;
  }
  GPU_DEVICE void load(HeadProduct &p, const uint4 *from, size_t tile_words) {
    GPU_UNROLL
    for (int r = 0; r < 4; ++r) head_load(place(from, tile_words) + 8 * r, p.w[r]);
  }
  // A part at a time, whose registers then wait for that of the next step.
  GPU_DEVICE void step(HeadProduct &p, const uint8_t *x, const uint4 *next, size_t tile_words) {
    x += lane_id() % 16 * HeadChunk<kTokens>::kVector;
    GPU_UNROLL
    for (int r = 0; r < 4; ++r) {
      GPU_UNROLL
      for (int q = 0; q < 4; ++q) {
        const uint4 u = make_uint4(head_levels(p.w[r], 4 * q), head_levels(p.w[r], 4 * q + 1),
                                   head_levels(p.w[r], 4 * q + 2), head_levels(p.w[r], 4 * q + 3));
        GPU_UNROLL
        for (int i = 0; i < kOwn; ++i) {
          const uint8_t *v = x + r * HeadChunk<kTokens>::kBytes + 16 * i * HeadChunk<kTokens>::kVector;
          mma::multiply16<1, false, true>(&p.acc[i], &u, ((const uint4 *)v)[q]);
        }
      }
      head_load(place(next, tile_words) + 8 * r, p.w[r]);
      head_in_order();
    }
  }
  template <class Give>
  GPU_DEVICE void results(const HeadProduct &p, Give give) {
    const int odd = lane_id() % 2;
    GPU_UNROLL
    for (int v = 0; v < 4; ++v) {
      GPU_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const int other = shuffle_xor(odd ? p.acc[i][v] : p.acc[i][v + 4], 1);
        give(i, token(i), 2 * (v + 4 * odd) + lane_id() / 16, odd ? other : p.acc[i][v], odd ? p.acc[i][v + 4] : other);
      }
    }
  }
  GPU_DEVICE void clear(HeadProduct &p) {
    GPU_UNROLL
    for (int i = 0; i < 8 * kOwn; ++i) p.acc[i / 8][i % 8] = 0;
  }
  GPU_DEVICE bool first_of_token() { return lane_id() < 16 && lane_id() % 2 == 0; }
  GPU_DEVICE int token(int i) { return 8 * i + lane_id() % 16 / 2; }
  GPU_DEVICE int mask(int m) { return m ? 16 : 1; }
};

#endif

template <int kTokens>
GPU_DEVICE void head_coarse(const HeadCoarseArgs &a) {
  typedef HeadProduct<kTokens> Product;
  let_next_start();
  const HeadRoom<kTokens> room = HeadRoom<kTokens>::of(shared_memory());
  const int steps = a.own.steps;
  const size_t tile_words = (size_t)steps * kHeadStepWords;
  const HeadStream own = head_stream(a.tile_count / 2);
  const uint4 *p = a.tiles + (own.first < own.last ? (size_t)own.first * 2 * tile_words : 0);
  Product product;
  Product::load(product, p, tile_words);
  wait_for_previous();
  head_stage<kTokens>(a, room);
  HeadBest best[Product::kOwn];
  GPU_UNROLL
  for (int i = 0; i < Product::kOwn; ++i) best[i] = head_nothing();
  for (int group = own.first; group < own.last; ++group) {
    Product::clear(product);
    for (int s = 0; s < steps; ++s) {
      const bool ends = s + 1 == steps;  // the very last step is read once more: loads are never conditional
      if (!ends || group + 1 < own.last) p += ends ? kHeadStepWords + tile_words : kHeadStepWords;
      Product::step(product, room.x + (size_t)4 * s * HeadChunk<kTokens>::kBytes, p, tile_words);
    }
    Product::results(product, [&](int i, int t, int in, int high, int low) {
      const int row = 16 * group + in;
      if (row < a.vocab && t < a.count) head_bounds(a, room.tokens[t], t, row, high, low, a.facts[row], best[i]);
    });
  }
  GPU_UNROLL
  for (int i = 0; i < Product::kOwn; ++i) {
    for (int m = 0; m < Product::kMasks; ++m) head_better(best[i], head_other(best[i], Product::mask(m)));
    if (Product::first_of_token()) room.found[wave_id() * kTokens + Product::token(i)] = best[i];
  }
  head_report<kTokens>(a, room.found);
}

// Two blocks on a multiprocessor are as many as there are, and nvcc has to be told.
#if defined(HALO_MMA_SYNC) && !defined(HALO_SIM)
#define HALO_HEAD_KERNEL extern "C" __global__ void __launch_bounds__(kHeadThreads, 2)
#else
#define HALO_HEAD_KERNEL GPU_KERNEL(kHeadThreads)
#endif
HALO_HEAD_KERNEL halo_head_coarse_8(HeadCoarseArgs a) { head_coarse<8>(a); }
HALO_HEAD_KERNEL halo_head_coarse_16(HeadCoarseArgs a) { head_coarse<16>(a); }

}  // namespace halo
