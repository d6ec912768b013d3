// Ternary matrix times the int8 activations of many tokens: the kernels, their epilogues and the choice among their
// shapes. What a wave does is prefill_wave.h. Device code.
#pragma once
#include "prefill_wave.h"

namespace halo {
namespace prefill {

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
