// Ternary matrix times the int8 activations of many tokens, on the matrix units. Device code.
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

// The next four codes of each of four bytes in base three: kv.h's sibling in product.h takes all five at once.
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

#if defined(HALO_MMA_SYNC)

// Two neighbouring floats, of which `some` are there.
GPU_DEVICE mma::Two load_two(const float *from, int some) {
  if (some >= 2) return *(const mma::Two *)from;
  return {some == 1 ? *from : 0.0f, 0.0f};
}
GPU_DEVICE void store_two(float *to, mma::Two x, int some) {
  if (some >= 2)
    *(mma::Two *)to = x;
  else if (some == 1)
    *to = x.x;
}

// A lane has two neighbouring rows of each tile. What it reads, it reads before it writes anything, since the compiler
// cannot know that no scale lies in the output.
template <class S>
GPU_DEVICE void put_results(const GemmArgs &a, const Results<S> &r, int token, int row) {
  const int kTiles = S::kWaveRows / 8, left = a.rows - row - lane_id() % 4 * 2;
  const int first = row + lane_id() % 4 * 2;
  mma::Two scale[kTiles];
  GPU_UNROLL
  for (int j = 0; j < kTiles; ++j) scale[j] = load_two(a.weight_scale + first + 8 * j, left - 8 * j);
  GPU_UNROLL
  for (int i = 0; i < S::kWaveTokens / 8; ++i) {
    const int own = token + 8 * i + lane_id() / 4;
    if (own >= a.tokens) continue;
    const float x_scale = a.q.scale[own];
    const int offset = a.q.sum[own];
    float *out = a.out + (size_t)own * a.out_stride;
    mma::Two old[kTiles];
    GPU_UNROLL
    for (int j = 0; j < kTiles; ++j)
      old[j] = a.epilogue == kAdd ? load_two(out + first + 8 * j, left - 8 * j) : mma::Two{0.0f, 0.0f};
    GPU_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const int *sums = &r.of[i / 2][j][i % 2 * 2];
      const float y = scaled(sums[0], offset, scale[j].x, x_scale), z = scaled(sums[1], offset, scale[j].y, x_scale);
      if (a.epilogue == kGated) {
        if (left > 8 * j) out[first / 2 + 4 * j] = gated(y, z, a.activation);
      } else if (a.epilogue == kAdd) {
        store_two(out + first + 8 * j, {old[j].x + y, old[j].y + z}, left - 8 * j);
      } else {
        store_two(out + first + 8 * j, {y, z}, left - 8 * j);
      }
    }
  }
}

#else

// What a lane's eight tokens of a tile have. Where there is no token, that of another.
struct TokenFacts {
  float scale[8];
  int offset[8];
  uint32_t at[8];  // of their outputs
};
GPU_DEVICE TokenFacts token_facts(const GemmArgs &a, int token) {
  TokenFacts t;
  GPU_UNROLL
  for (int v = 0; v < 8; ++v) {
    const int own = token + 2 * v < a.tokens ? token + 2 * v : a.tokens - 1;
    t.scale[v] = a.q.scale[own];
    t.offset[v] = a.q.sum[own];
    t.at[v] = (uint32_t)own * a.out_stride;
  }
  return t;
}

// A lane has one row, its neighbour the other of a pair: one takes four tokens of both, the other the other four.
GPU_DEVICE void put_gated(const GemmArgs &a, const TokenFacts &t, int token, int row, float scale, const int (&sums)[8]) {
  const bool odd = row % 2, some = row < a.rows;
  const float other = shuffle_xor(scale, 1), gate_scale = odd ? other : scale, up_scale = odd ? scale : other;
  GPU_UNROLL
  for (int v = 0; v < 4; ++v) {
    const int early = sums[v], late = sums[v + 4], given = shuffle_xor(odd ? early : late, 1);
    const int offset = odd ? t.offset[v + 4] : t.offset[v];
    const float x_scale = odd ? t.scale[v + 4] : t.scale[v];
    const float gate = scaled(odd ? given : early, offset, gate_scale, x_scale);
    const float up = scaled(odd ? late : given, offset, up_scale, x_scale);
    const uint32_t at = (odd ? t.at[v + 4] : t.at[v]) + row / 2;
    if (some && token + 2 * v + (odd ? 8 : 0) < a.tokens) a.out[at] = gated(gate, up, a.activation);
  }
}

// What it reads, it reads before it writes anything, since the compiler cannot know that no scale lies in the output.
GPU_DEVICE void put_rows(const GemmArgs &a, const TokenFacts &t, int token, int row, float scale, const int (&sums)[8]) {
  float old[8];
  GPU_UNROLL
  for (int v = 0; v < 8; ++v) old[v] = a.epilogue == kAdd ? a.out[t.at[v] + (row < a.rows ? row : a.rows - 1)] : 0.0f;
  mma::keep_order();
  GPU_UNROLL
  for (int v = 0; v < 8; ++v) {
    const float y = scaled(sums[v], t.offset[v], scale, t.scale[v]);
    if (row < a.rows && token + 2 * v < a.tokens) a.out[t.at[v] + row] = a.epilogue == kAdd ? old[v] + y : y;
  }
}

template <class S>
GPU_DEVICE void put_results(const GemmArgs &a, const Results<S> &r, int token, int row) {
  const int kTiles = S::kWaveRows / 16, first = row + lane_id() % 16;
  float scale[kTiles];
  GPU_UNROLL
  for (int j = 0; j < kTiles; ++j) scale[j] = a.weight_scale[first + 16 * j < a.rows ? first + 16 * j : a.rows - 1];
  GPU_UNROLL
  for (int m = 0; m < S::kWaveTokens / 16; ++m) {
    const int own = token + 16 * m + lane_id() / 16;
    const TokenFacts t = token_facts(a, own);
    GPU_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      if (a.epilogue == kGated)
        put_gated(a, t, own, first + 16 * j, scale[j], r.of[j][m]);
      else
        put_rows(a, t, own, first + 16 * j, scale[j], r.of[j][m]);
    }
  }
}

#endif

// The sums of the waves that share a rectangle, into the first of them.
template <class S>
GPU_DEVICE void add_split(Results<S> &r, int share) {
  const int kCount = S::kWaveTokens * S::kWaveRows / kWave, own = mma::own_wave() % (S::kAcross * S::kDown);
  int *shared = (int *)shared_memory() + own * kCount * kWave + lane_id(), *sums = (int *)&r;
  const int others = S::kAcross * S::kDown * kCount * kWave;
  static_assert((S::kSplit - 1) * S::kTokens * S::kRows * 4 <= kStages * S::kStageBytes, "the sums fit the stages");
  sync_block();
  if (share > 0) {
    GPU_UNROLL
    for (int i = 0; i < kCount; ++i) shared[(share - 1) * others + i * kWave] = sums[i];
  }
  sync_block();
  if (share > 0) return;
  for (int s = 0; s < S::kSplit - 1; ++s) {
    GPU_UNROLL
    for (int i = 0; i < kCount; ++i) sums[i] += shared[s * others + i * kWave];
  }
}

// Grid: rectangles of tokens, of rows.
template <class S>
GPU_DEVICE void gemm(const GemmArgs &a) {
  const int share = mma::own_wave() / (S::kAcross * S::kDown), place = mma::own_wave() % (S::kAcross * S::kDown);
  const int token = place / S::kAcross * S::kWaveTokens;  // in the block
  const int row = block_y() * S::kRows + place % S::kAcross * S::kWaveRows, first_token = block_id() * S::kTokens;
  const int pairs = 2 * a.steps, stages = (pairs + S::kSplit - 1) / S::kSplit;
  Weights<S> weights;
  Results<S> results = {};
  Source source = {row / kTileRows, share < pairs ? share : pairs - 1};
  load_weights<S>(weights, a, source, 0, 0);
  load_weights<S>(weights, a, source, 1, 1);
  let_next_start();
  wait_for_previous();
  Activations<S> x;
  GPU_UNROLL
  for (int s = 0; s < kStages - 1; ++s) {
    fetch<S>(x, a, first_token, s, 2 * pairs);
    land<S>(x, s);
  }
  for (int s = 0; s < stages; ++s) {
#if defined(HALO_MMA_SYNC)
    mma::wait<kStages - 2>();
#endif
    mma::sync_shared();
    fetch<S>(x, a, first_token, s + kStages - 1, 2 * pairs);
    const bool some = S::kSplit == 1 || s * S::kSplit + share < pairs;
    source.pair += source.pair + S::kSplit < pairs ? S::kSplit : 0;
    if (some)
      multiply<S>(a, results, weights, shared_memory() + s % kStages * S::kStageBytes, 2 * share, token, source);
    land<S>(x, s + kStages - 1);
  }
  if (S::kSplit > 1) {
    add_split<S>(results, share);
    if (share > 0) return;
  }
  put_results<S>(a, results, first_token + token, row);
}

template <Packing kPacking>
using Wide = GemmShape<kPacking, 128, 256, 64, 64>;
template <Packing kPacking>
using Middle = GemmShape<kPacking, 128, 128, 64, 32>;
template <Packing kPacking>
using Small = GemmShape<kPacking, 64, 64, 32, 32>;
template <Packing kPacking>
using Narrow = GemmShape<kPacking, 32, 64, 32, 32>;

#if defined(__HIP__)
const bool kHasWide = false;  // a wave's 64 x 64 results and what they want beside are more than gfx11's 256 registers
#else
const bool kHasWide = true;
GPU_KERNEL(kThreads) halo_gemm_wide_2(GemmArgs a) { gemm<Wide<Packing::two_bits>>(a); }
GPU_KERNEL(kThreads) halo_gemm_wide_3(GemmArgs a) { gemm<Wide<Packing::base_three>>(a); }
#endif
#define HALO_TWO_BLOCKS kThreads, 2  // on an SM: 128 registers a lane there; gfx11 is within its bounds anyway
GPU_KERNEL(HALO_TWO_BLOCKS) halo_gemm_middle_2(GemmArgs a) { gemm<Middle<Packing::two_bits>>(a); }
GPU_KERNEL(kThreads) halo_gemm_small_2(GemmArgs a) { gemm<Small<Packing::two_bits>>(a); }
GPU_KERNEL(kThreads) halo_gemm_small_3(GemmArgs a) { gemm<Small<Packing::base_three>>(a); }
GPU_KERNEL(kThreads) halo_gemm_narrow_2(GemmArgs a) { gemm<Narrow<Packing::two_bits>>(a); }
GPU_KERNEL(kThreads) halo_gemm_middle_3(GemmArgs a) { gemm<Middle<Packing::base_three>>(a); }
GPU_KERNEL(kThreads) halo_gemm_narrow_3(GemmArgs a) { gemm<Narrow<Packing::base_three>>(a); }

struct GemmKernel {
  void (*kernel)(GemmArgs);
  int tokens, rows;
  size_t shared;
};

template <class S>
GemmKernel gemm_kernel(void (*kernel)(GemmArgs)) {
  return {kernel, S::kTokens, S::kRows, (size_t)kStages * S::kStageBytes};
}

const int kGemmShapes = 4;  // wide, middle, small, narrow

inline GemmKernel gemm_shape(int shape, Packing packing) {
  const bool two = packing == Packing::two_bits;
  const Packing a = Packing::two_bits, b = Packing::base_three;
#if !defined(__HIP__)
  if (shape == 0) return two ? gemm_kernel<Wide<a>>(halo_gemm_wide_2) : gemm_kernel<Wide<b>>(halo_gemm_wide_3);
#endif
  if (shape < 2) return two ? gemm_kernel<Middle<a>>(halo_gemm_middle_2) : gemm_kernel<Middle<b>>(halo_gemm_middle_3);
  if (shape == 2) return two ? gemm_kernel<Small<a>>(halo_gemm_small_2) : gemm_kernel<Small<b>>(halo_gemm_small_3);
  return two ? gemm_kernel<Narrow<a>>(halo_gemm_narrow_2) : gemm_kernel<Narrow<b>>(halo_gemm_narrow_3);
}

inline Grid gemm_grid(const GemmKernel &k, const GemmArgs &a) {
  return {(a.tokens + k.tokens - 1) / k.tokens, (a.rows + k.rows - 1) / k.rows};
}

// What a shape costs: results that the busiest multiprocessor makes, and what small rectangles make slower by an estimate
// of what they read for each product.
inline double gemm_cost(int shape, const GemmArgs &a, Packing packing, int multiprocessors) {
  const double slower[kGemmShapes] = {1.0, 1.05, 1.3, 1.7};
  const GemmKernel k = gemm_shape(shape, packing);
  const Grid grid = gemm_grid(k, a);
  const long long turns = ((long long)grid.x * grid.y + multiprocessors - 1) / multiprocessors;
  return slower[shape] * (double)turns * k.tokens * k.rows;
}

// `forced`: that shape (tests), or -1.
inline void launch_gemm_kernel(const GemmArgs &a, Packing packing, int multiprocessors, int forced, Stream &stream) {
  int shape = forced;
  for (int i = kHasWide ? 0 : 1; i < kGemmShapes && forced < 0; ++i)
    if (shape < 0 || gemm_cost(i, a, packing, multiprocessors) < gemm_cost(shape, a, packing, multiprocessors)) shape = i;
  const GemmKernel k = gemm_shape(shape, packing);
  launch(k.kernel, gemm_grid(k, a), kThreads, k.shared, stream, a);
}

}  // namespace prefill
}  // namespace halo
