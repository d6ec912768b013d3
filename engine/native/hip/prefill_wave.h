// What a wave does of a product of many tokens (prefill_gemm.h): activations through shared memory, weights expanded in
// registers, their products on the matrix units. Not what becomes of the sums. Device code.
//
// A block of 8 waves has kTokens x kRows results, each wave a rectangle of them; where there are few results, several
// waves share one rectangle's columns (kSplit). Activations lie in shared memory, some stages ahead. The weights never
// do: what one lane must have of a tile is one word (mma.sync: 64 columns of 8 rows are 128 bytes in a row) or sixteen
// bytes (WMMA: a row's 64 columns), straight from the memory, and it is expanded in registers: 7 operations for the four
// words of 16 codes, which then meet 4 or so tiles of tokens. On an H100 that is 28 operations of 2 cycles to the 32
// products of 6.5 that a 64 x 32 rectangle has of 64 columns; on gfx1151 7 to four products of 32 cycles.
//
// Shared memory: a stage holds pairs of parts (layout.h: 64 columns, or 80 in base three) as [part][token][columns]. Two
// bits: a token's four units of 16 bytes stand at unit ^ (token / 2 % 4), so that the 8 lanes that are served at once hit
// 8 different groups of 4 banks, be they 8 tokens at one unit (WMMA), 2 tokens at four (mma.sync, and the writes). Base
// three: a token's 20 words are its distance, 5 units, so 8 tokens at one unit differ too; so do the words 20 g + 5 t
// of mma.sync's 32-bit loads.
#pragma once
#include "arithmetic.h"
#include "launch.h"
#include "mma.h"
#include "prefill_launch.h"

namespace halo {
namespace prefill {

const int kPairBytes = 256;  // of a tile's two parts

#if defined(HALO_MMA_SYNC)
const int kStages = 3;
#else
const int kStages = 2;
#endif

// kWaveTokens x kWaveRows a wave.
template <Packing kPacking_, int kTokens_, int kRows_, int kWaveTokens_, int kWaveRows_>
struct GemmShape {
  static const Packing kPacking = kPacking_;
  static const int kTokens = kTokens_, kRows = kRows_, kWaveTokens = kWaveTokens_, kWaveRows = kWaveRows_;
  static const int kAcross = kRows / kWaveRows, kDown = kTokens / kWaveTokens;
  static const int kSplit = kThreads / kWave / (kAcross * kDown);
  static const int kPart = step_cols(kPacking) / 4, kUnits = kPart / 16;
  static const int kPartBytes = kTokens * kPart, kStageBytes = 2 * kSplit * kPartBytes;
  static const int kCopies = kStageBytes / 16 / kThreads;
  static_assert(kCopies * 16 * kThreads == kStageBytes, "each thread copies as much");
  // Byte of a stage: unit `unit` of a token.
  GPU_DEVICE int at(int part, int token, int unit) {
    if (kPacking == Packing::two_bits) unit ^= token / 2 % 4;
    return part * kPartBytes + token * kPart + 16 * unit;
  }
};

// A stage of activations on its way, where it comes through registers.
template <class S>
struct Activations {
#if !defined(HALO_MMA_SYNC)
  uint32_t coming[S::kCopies][4];
#endif
};

// The unit that copy i of a thread is: its part, token and number in a stage.
struct Unit {
  int part, token, unit;
};
template <class S>
GPU_DEVICE Unit unit_of(int thread, int i) {
  const int at = thread + i * kThreads;
  return {at / S::kUnits / S::kTokens, at / S::kUnits % S::kTokens, at % S::kUnits};
}

// Send a stage on its way. `parts`: of all columns; beyond them it does not matter what comes, as long as it can be read.
template <class S>
GPU_DEVICE void fetch(Activations<S> &x, const GemmArgs &a, int first_token, int stage, int parts) {
  const int thread = mma::fresh(thread_id());
  GPU_UNROLL
  for (int i = 0; i < S::kCopies; ++i) {
    const Unit u = unit_of<S>(thread, i);
    const int part = stage * 2 * S::kSplit + u.part, token = first_token + u.token;
    const int8_t *from = a.q.q + ((uint32_t)(token < a.tokens ? token : a.tokens - 1) * a.q.stride +
                                  (part < parts ? part : 0) * S::kPart + u.unit * 16);
#if defined(HALO_MMA_SYNC)
    uint8_t *to = shared_memory() + stage % kStages * S::kStageBytes + S::at(u.part, u.token, u.unit);
    if (part < parts) mma::copy16(to, from);
#else
    const uint4 unit = *(const uint4 *)from;
    x.coming[i][0] = unit.x, x.coming[i][1] = unit.y, x.coming[i][2] = unit.z, x.coming[i][3] = unit.w;
#endif
  }
#if defined(HALO_MMA_SYNC)
  (void)x;
  mma::commit();
#else
  mma::keep_order();
#endif
}

// Put down what came through registers.
template <class S>
GPU_DEVICE void land(Activations<S> &x, int stage) {
#if defined(HALO_MMA_SYNC)
  (void)x, (void)stage;
#else
  const int thread = mma::fresh(thread_id());
  GPU_UNROLL
  for (int i = 0; i < S::kCopies; ++i) {
    const Unit u = unit_of<S>(thread, i);
    *(uint4 *)(shared_memory() + stage % kStages * S::kStageBytes + S::at(u.part, u.token, u.unit)) =
        make_uint4(x.coming[i][0], x.coming[i][1], x.coming[i][2], x.coming[i][3]);
  }
#endif
}

// Four bytes in base three, from which four codes come at a time: product.h, which wants all five times four at once,
// has its own.
struct Digits {
  uint32_t even, odd;
};
GPU_DEVICE Digits digits_of(uint32_t word) { return {word & 0x00ff00ffu, word >> 8 & 0x00ff00ffu}; }
GPU_DEVICE uint32_t next_digit(Digits &x) {
  const uint32_t even = x.even * 3, odd = x.odd * 3;
  x.even = even & 0x00ff00ffu;
  x.odd = odd & 0x00ff00ffu;
  return (even >> 8 & 0x00030003u) | (odd & 0x03000300u);
}

// Which weights a wave takes: its tiles, of one pair of parts.
struct Source {
  int first_tile, pair;
};
GPU_DEVICE uint32_t tile_offset(const GemmArgs &a, const Source &from, int tile) {
  const int own = from.first_tile + tile < a.tile_count ? from.first_tile + tile : a.tile_count - 1;
  return (uint32_t)own * a.steps * kStepBytes + from.pair * kPairBytes;
}

// In all of these, `next` are the weights to load as soon as there is room for them.
#if defined(HALO_MMA_SYNC)

// What a wave has of the weights of a pair of parts, and its results so far: row g + 8 h, column 2 t + e of the tile.
template <class S>
struct Weights {
  static const int kTiles = S::kWaveRows / 8;
  uint32_t words[2][kTiles];
};
template <class S>
struct Results {
  int of[S::kWaveTokens / 16][S::kWaveRows / 8][4];
};

template <class S>
GPU_DEVICE void load_weights(Weights<S> &w, const GemmArgs &a, const Source &from, int part, int to) {
  GPU_UNROLL
  for (int j = 0; j < Weights<S>::kTiles; ++j)
    w.words[to][j] = *(const uint32_t *)(a.tiles + tile_offset(a, from, j) + part * 128 + lane_id() * 4);
}

// Lane (g, t) has 16 columns in a word, 16 t to 16 t + 15 of the part: the 16 bytes that it needs of tokens g and g + 8.
template <class S>
GPU_DEVICE void load_tokens(uint4 (&x)[2], const uint8_t *stage, int part, int token) {
  x[0] = *(const uint4 *)(stage + S::at(part, token + lane_id() / 4, lane_id() % 4));
  x[1] = *(const uint4 *)(stage + S::at(part, token + lane_id() / 4 + 8, lane_id() % 4));
}

// Either half of those with the codes that they meet.
GPU_DEVICE void multiply_half(int *sums, const uint4 (&x)[2], int half, const uint32_t *codes) {
  const uint32_t early[4] = {x[0].x, x[1].x, x[0].y, x[1].y}, late[4] = {x[0].z, x[1].z, x[0].w, x[1].w};
  mma::multiply8<true>(sums, half ? late : early, codes[2 * half], codes[2 * half + 1]);
}

GPU_DEVICE void expand(uint32_t (&codes)[4], uint32_t word) {
  GPU_UNROLL
  for (int s = 0; s < 4; ++s) codes[s] = word >> 2 * s & 0x03030303u;
}

// Of tokens and codes, the operands that want fewer registers are all kept, the others come one by one.
template <class S>
GPU_DEVICE void multiply_two_bits(const GemmArgs &a, Results<S> &r, Weights<S> &w, const uint8_t *stage, int part,
                                  int token, const Source &next) {
  const int kM = S::kWaveTokens / 16, kTiles = Weights<S>::kTiles;
  HALO_MMA_LOOP  // twice the code would want more registers than there are
  for (int p = 0; p < 2; ++p) {
    if (kTiles * 4 < kM * 8) {
      uint32_t codes[kTiles][4];
      GPU_UNROLL
      for (int j = 0; j < kTiles; ++j) expand(codes[j], w.words[0][j]);
      GPU_UNROLL
      for (int m = 0; m < kM; ++m) {
        uint4 x[2];
        load_tokens<S>(x, stage, part + p, token + 16 * m);
        GPU_UNROLL
        for (int j = 0; j < 2 * kTiles; ++j) multiply_half(r.of[m][j % kTiles], x, j / kTiles, codes[j % kTiles]);
      }
    } else {
      uint4 x[kM][2];
      GPU_UNROLL
      for (int m = 0; m < kM; ++m) load_tokens<S>(x[m], stage, part + p, token + 16 * m);
      GPU_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        uint32_t codes[4];
        expand(codes, w.words[0][j]);
        GPU_UNROLL
        for (int m = 0; m < 2 * kM; ++m) multiply_half(r.of[m % kM][j], x[m % kM], m / kM, codes);
      }
    }
    GPU_UNROLL
    for (int j = 0; j < kTiles; ++j) w.words[0][j] = w.words[1][j];
    load_weights<S>(w, a, next, p, 1);
  }
}

// The ten words of a lane's 20 and 20 columns make five products.
template <class S>
GPU_DEVICE void multiply_base_three(const GemmArgs &a, Results<S> &r, Weights<S> &w, const uint8_t *stage, int part,
                                    int token, const Source &next) {
  const int kM = S::kWaveTokens / 16, kTiles = Weights<S>::kTiles, g = lane_id() / 4, t = lane_id() % 4;
  const uint8_t *own = stage + part * S::kPartBytes + (token + g) * S::kPart + 20 * t;
  Digits digits[kTiles];
  GPU_UNROLL
  for (int j = 0; j < kTiles; ++j) digits[j] = digits_of(w.words[0][j]);
  load_weights<S>(w, a, next, 0, 0);
  GPU_UNROLL
  for (int k = 0; k < 5; ++k) {
    uint32_t x[kM][4];
    GPU_UNROLL
    for (int m = 0; m < kM; ++m) {
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int word = 2 * k + i / 2;
        x[m][i] = *(const uint32_t *)(own + word / 5 * S::kPartBytes + (16 * m + i % 2 * 8) * S::kPart + word % 5 * 4);
      }
    }
    GPU_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const uint32_t b0 = next_digit(digits[j]);
      if (k == 2) digits[j] = digits_of(w.words[1][j]);
      const uint32_t b1 = next_digit(digits[j]);
      GPU_UNROLL
      for (int m = 0; m < kM; ++m) mma::multiply8<true>(r.of[m][j], x[m], b0, b1);
    }
    if (k == 2) load_weights<S>(w, a, next, 1, 1);
  }
}

template <class S>
GPU_DEVICE void multiply(const GemmArgs &a, Results<S> &r, Weights<S> &w, const uint8_t *stage, int part, int token,
                         const Source &next) {
  if (S::kPacking == Packing::two_bits)
    multiply_two_bits<S>(a, r, w, stage, part, token, next);
  else
    multiply_base_three<S>(a, r, w, stage, part, token, next);
}

#else

// Lane l has row l % 16 of each 16: 16 bytes of each part. Results: token 2 v + l / 16, row l % 16.
template <class S>
struct Weights {
  static const int kTiles = S::kWaveRows / 16;
  uint4 words[2][kTiles];
};
template <class S>
struct Results {
  int of[S::kWaveRows / 16][S::kWaveTokens / 16][8];
};

template <class S>
GPU_DEVICE void load_weights(Weights<S> &w, const GemmArgs &a, const Source &from, int part, int to) {
  const int lane = lane_id();
  GPU_UNROLL
  for (int j = 0; j < Weights<S>::kTiles; ++j)
    w.words[to][j] =
        *(const uint4 *)(a.tiles + tile_offset(a, from, 2 * j + lane % 16 / 8) + part * 128 + lane % 8 * 16);
}

GPU_DEVICE uint32_t word_number(const uint4 &w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

template <class S>
GPU_DEVICE void multiply(const GemmArgs &a, Results<S> &r, Weights<S> &w, const uint8_t *stage, int part, int token,
                         const Source &next) {
  const int kM = S::kWaveTokens / 16, kTiles = Weights<S>::kTiles;
  GPU_UNROLL
  for (int p = 0; p < 2; ++p) {
    Digits digits[kTiles];
    GPU_UNROLL
    for (int k = 0; k < S::kUnits; ++k) {
      uint4 x[kM];
      GPU_UNROLL
      for (int m = 0; m < kM; ++m)
        x[m] = *(const uint4 *)(stage + S::at(part + p, token + 16 * m + lane_id() % 16, k));
      GPU_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        uint32_t codes[4];
        GPU_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (S::kPacking == Packing::two_bits) {
            codes[i] = word_number(w.words[p][j], k) >> 2 * i & 0x03030303u;
          } else {
            const int number = 4 * k + i;
            if (number % 5 == 0) digits[j] = digits_of(word_number(w.words[p][j], number / 5));
            codes[i] = next_digit(digits[j]);
          }
        }
        mma::multiply16<kM, true, false>(r.of[j], x, make_uint4(codes[0], codes[1], codes[2], codes[3]));
      }
    }
    load_weights<S>(w, a, next, p, p);
  }
}

#endif

}  // namespace prefill
}  // namespace halo
