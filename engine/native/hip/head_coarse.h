// The coarse pass of the output head: an upper bound of every logit, and each block's best rows, from six bits a
// weight. Here one token (by dot products, with the final norm in it), what several share with it, and how the layout
// is made; several tokens are head_many.h's. Device code.
#pragma once
#include "head_state.h"
#include "mma.h"

namespace halo {

const float kNoFloat = -__builtin_huge_valf();

// 64 columns of kTokens tokens in shared memory: the two vectors of each token, and 16 bytes more, so that the parts of
// a step lie in different banks. One token: high and low, 64 bytes each. More: vectors 80 bytes apart, since the lanes
// of a matrix operand read several vectors at once.
template <int kTokens>
struct HeadChunk {
  static constexpr int kVector = kTokens == 1 ? 64 : 80;
  static constexpr int kBytes = 2 * kTokens * kVector + (kTokens == 1 ? 16 : 32);
};

// What a lane holds of a step of a tile.
struct HeadLevels {
  uint32_t word[12];
};

GPU_DEVICE void head_load(const uint4 *p, HeadLevels &w) {
  GPU_UNROLL
  for (int i = 0; i < 3; ++i) {
    const uint4 v = load_once(p + kWave * i);
    w.word[4 * i] = v.x, w.word[4 * i + 1] = v.y, w.word[4 * i + 2] = v.z, w.word[4 * i + 3] = v.w;
  }
}

// What stands before this is not moved behind it by gfx1151's compiler, nor the other way round: it would gather loads
// until the registers are used up, and wait for all of them at once.
GPU_DEVICE void head_in_order() {
#if defined(__HIP_DEVICE_COMPILE__)
  __builtin_amdgcn_sched_barrier(0);
#endif
}

// Levels of columns 4 i to 4 i + 3 of a lane's 64.
GPU_DEVICE uint32_t head_levels(const HeadLevels &w, int i) {
  if (i < 12) return w.word[i] & 0x3f3f3f3fu;
  const int j = 3 * (i - 12);
  return (w.word[j] >> 6 & 0x03030303u) | (w.word[j + 1] >> 4 & 0x0c0c0c0cu) | (w.word[j + 2] >> 2 & 0x30303030u);
}

// 128 bytes that will be wanted soon: into the L2, where the target can be told so.
GPU_DEVICE void head_prefetch(const uint8_t *p) {
#if defined(HALO_MMA_SYNC) && !defined(HALO_SIM)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)p;
#endif
}

GPU_DEVICE HeadBest head_nothing() { return {kNoFloat, kNoFloat, kNoFloat, 0, 0}; }

// Ties go to the lower row; what is no number loses.
GPU_DEVICE void head_better(HeadBest &best, const HeadBest &other) {
  if (other.certain > best.certain) best.certain = other.certain;
  if (other.seen > best.seen || (other.seen == best.seen && other.seen_row < best.seen_row))
    best.seen = other.seen, best.seen_row = other.seen_row;
  if (other.drawn > best.drawn || (other.drawn == best.drawn && other.drawn_row < best.drawn_row))
    best.drawn = other.drawn, best.drawn_row = other.drawn_row;
}

GPU_DEVICE HeadBest head_other(const HeadBest &best, int mask) {
  return {shuffle_xor(best.certain, mask), shuffle_xor(best.seen, mask), shuffle_xor(best.drawn, mask),
          shuffle_xor(best.seen_row, mask), shuffle_xor(best.drawn_row, mask)};
}

// The bounds of one logit: coarse_bounds in cpu/lanes.inc.h. A thread's rows must rise.
GPU_DEVICE void head_bounds(const HeadCoarseArgs &a, const HeadToken &token, int t, int row, int high, int low,
                            const uint4 &facts, HeadBest &best) {
  const int highs = 2 * high - 63 * token.high_sum, lows = 2 * low - 63 * token.low_sum;
  const float whole = fused((float)highs, 256.0f, (float)lows);
  const float seen = whole * token.half_step * float_of(facts.x);
  float bound = fused(token.by_error, float_of(facts.y), token.by_norm * float_of(facts.z));
  bound = bound + 1.2e-38f;
  const float certain = seen - bound, upper = seen + bound;
  a.upper[(size_t)t * (8 * a.tile_count) + row] = upper;
  if (certain > best.certain) best.certain = certain;
  if (seen > best.seen) best.seen = seen, best.seen_row = row;
  if (a.noise) {
    const float drawn = upper + a.noise[(size_t)t * a.vocab + row];
    if (drawn > best.drawn) best.drawn = drawn, best.drawn_row = row;
  }
}

// Where things lie in a block's shared memory.
template <int kTokens>
struct HeadRoom {
  float *scratch;
  HeadToken *tokens;
  HeadBest *found;  // [wave][token]
  uint8_t *x;
  GPU_DEVICE HeadRoom of(uint8_t *shared) {
    HeadToken *tokens = (HeadToken *)(shared + kHeadScratch);
    HeadBest *found = (HeadBest *)(tokens + kTokens);
    const size_t bytes = (sizeof(HeadBest) * kTokens * kHeadWaves + 15) / 16 * 16;
    return {(float *)shared, tokens, found, (uint8_t *)found + bytes};
  }
};

// Neighbouring groups of tiles: one stream of memory for each wave.
struct HeadStream {
  int first, last;
};
GPU_DEVICE HeadStream head_stream(int groups) {
  const long long waves = (long long)block_count() * kHeadWaves, wave = block_id() * kHeadWaves + mma::own_wave();
  return {(int)(wave * groups / waves), (int)((wave + 1) * groups / waves)};
}

template <int kTokens>
GPU_DEVICE void head_report(const HeadCoarseArgs &a, HeadBest *found) {
  sync_block();
  const int t = thread_id();
  if (t >= kTokens || t >= a.count) return;
  HeadBest own = found[t];
  for (int w = 1; w < kHeadWaves; ++w) head_better(own, found[w * kTokens + t]);
  a.best[(size_t)t * block_count() + block_id()] = own;
}

// ---- one token ----

const int kHeadTiles = 64;  // whose sums a block holds at once

// A wave's share of the steps of the first kHeadTiles tiles of a range.
struct HeadSteps {
  size_t begin;       // of all steps
  int tile, in_tile;  // where the first one is: its tile of the range, its number there
  int count;
};
GPU_DEVICE HeadSteps head_steps(int tile, int last, int steps) {
  if (tile >= last) return {0, 0, 0, 0};
  const long long all = (long long)(last - tile < kHeadTiles ? last - tile : kHeadTiles) * steps;
  const int first = (int)(all * mma::own_wave() / kHeadWaves), end = (int)(all * (mma::own_wave() + 1) / kHeadWaves);
  if (first == end) return {0, 0, 0, 0};
  return {(size_t)tile * steps + first, first / steps, first % steps, end - first};
}

// Lane l has row l % 8 and part l / 8 of each step; its 64 columns of high and low lie at x.
GPU_DEVICE void head_step(const HeadLevels &w, const uint8_t *x, int &high, int &low) {
  GPU_UNROLL
  for (int q = 0; q < 4; ++q) {
    const uint4 a = ((const uint4 *)x)[q], b = ((const uint4 *)(x + 64))[q];
    const uint32_t u[4] = {head_levels(w, 4 * q), head_levels(w, 4 * q + 1), head_levels(w, 4 * q + 2),
                           head_levels(w, 4 * q + 3)};
    high = dot4_us(u[0], a.x, high), low = dot4_us(u[0], b.x, low);
    high = dot4_us(u[1], a.y, high), low = dot4_us(u[1], b.y, low);
    high = dot4_us(u[2], a.z, high), low = dot4_us(u[2], b.z, low);
    high = dot4_us(u[3], a.w, high), low = dot4_us(u[3], b.w, low);
  }
}

// What a wave has on its way: two steps, whose registers take turns.
struct HeadFlow {
  HeadLevels first, second;
};

// A wave's share of the steps, each row's sums added to `sums` [row][high, low]; `then` is what it will get next. In
// the end flow.first has the first step of that. Loads are never conditional: gfx1151's compiler would wait for them
// where the condition ends. What is not wanted is read again from where the wave is.
GPU_DEVICE void head_share(const HeadCoarseArgs &a, const HeadSteps &own, const HeadSteps &then, const uint8_t *x,
                           HeadFlow &flow, int *sums) {
  const int steps = a.own.steps, part = lane_id() / 8;
  const uint4 *p = a.tiles + own.begin * kHeadStepWords + lane_id();
  const uint4 *behind = a.tiles + then.begin * kHeadStepWords + lane_id();
  int local = own.tile, s = own.in_tile, high = 0, low = 0;
  x += part * HeadChunk<1>::kBytes;
  // Step i of the share, whose weights are there; the same registers then wait for step i + 2.
  const auto take = [&](HeadLevels &w, int i) {
    head_step(w, x + (size_t)4 * s * HeadChunk<1>::kBytes, high, low);
    const int ahead = i + 2 - own.count;  // only the last share of all can have less than two steps
    const uint4 *later = ahead < then.count ? behind + ahead * kHeadStepWords : p;
    head_load(ahead < 0 ? p + 2 * kHeadStepWords : later, w);
    head_in_order();
    p += kHeadStepWords;
    if (++s < steps && i + 1 < own.count) return;
    high += shuffle_xor(high, 8), low += shuffle_xor(low, 8);
    high += shuffle_xor(high, 16), low += shuffle_xor(low, 16);
    if (part < 2) atomic_add(&sums[2 * (8 * local + lane_id() % 8) + part], part ? low : high);
    ++local;
    s = high = low = 0;
  };
  for (int i = 0; i < own.count; i += 2) {
    take(flow.first, i);
    if (i + 1 < own.count) take(flow.second, i + 1);
  }
  if (own.count % 2) {
    const HeadLevels later = flow.first;
    flow.first = flow.second;
    flow.second = later;
  }
}

// What may be on its way before the hidden state is there, and some memory more.
GPU_DEVICE HeadFlow head_begin(const HeadCoarseArgs &a, const HeadSteps &own) {
  const uint4 *p = a.tiles + own.begin * kHeadStepWords;
  HeadFlow flow;
  head_load(p + lane_id(), flow.first);
  head_load(p + (own.count > 1 ? kHeadStepWords : 0) + lane_id(), flow.second);
  if (lane_id() < 12 * (own.count - 2)) head_prefetch((const uint8_t *)(p + 2 * kHeadStepWords) + 128 * lane_id());
  return flow;
}

// The waves of a block share the steps of its tiles, up to kHeadTiles of them at once: one stream of memory for each
// wave. The rows' integer sums meet in shared memory, where the order does not matter.
GPU_KERNEL(kHeadThreads) halo_head_coarse_1(HeadCoarseArgs a) {
  const int kRowsOfThread = kHeadTiles * 8 / kHeadThreads;
  let_next_start();
  const HeadRoom<1> room = HeadRoom<1>::of(shared_memory());
  int *sums = (int *)(room.x + (size_t)4 * a.own.steps * HeadChunk<1>::kBytes);
  const int first = (int)((long long)a.tile_count * block_id() / block_count());
  const int last = (int)((long long)a.tile_count * (block_id() + 1) / block_count());
  HeadSteps own = head_steps(first, last, a.own.steps);
  HeadFlow flow = head_begin(a, own);
  wait_for_previous();
  const auto store = [&](int i, uint32_t high, uint32_t low) {
    uint32_t *at = (uint32_t *)(room.x + (size_t)(i / 16) * HeadChunk<1>::kBytes) + i % 16;
    at[0] = high;
    at[16] = low;
  };
  float *row_of_x = (float *)(sums + 2 * 8 * kHeadTiles);
  const HeadToken token = head_normed(a.own, 0, block_id() == 0, row_of_x, room.scratch, store);
  HeadBest best = head_nothing();
  for (int tile = first; tile < last; tile += kHeadTiles) {
    const int rows = 8 * (last - tile < kHeadTiles ? last - tile : kHeadTiles);
    uint4 facts[kRowsOfThread] = {};
    GPU_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int row = thread_id() + i * kHeadThreads;
      if (row < rows) facts[i] = a.facts[8 * tile + row];
      sums[2 * row] = 0, sums[2 * row + 1] = 0;
    }
    sync_block();
    const HeadSteps then = head_steps(tile + kHeadTiles, last, a.own.steps);
    head_share(a, own, then, room.x, flow, sums);
    own = then;
    sync_block();
    GPU_UNROLL
    for (int i = 0; i < kRowsOfThread; ++i) {
      const int in = thread_id() + i * kHeadThreads, row = 8 * tile + in;
      if (in < rows && row < a.vocab) head_bounds(a, token, 0, row, sums[2 * in], sums[2 * in + 1], facts[i], best);
    }
  }
  for (int mask = 1; mask < kWave; mask *= 2) head_better(best, head_other(best, mask));
  if (lane_id() == 0) room.found[wave_id()] = best;
  head_report<1>(a, room.found);
}

// ---- the layout: once, at load ----

// Columns 4 i to 4 i + 3 of a row of the file's tiles (engine/formats/tiles.py).
GPU_DEVICE uint32_t head_file_levels(const HeadRepackArgs &a, int row, int i) {
  if (i / 4 >= a.chunks) return 0;
  const uint8_t *chunk = a.source + ((size_t)(row / 16) * a.chunks + i / 4) * 192;
  const int group = i % 4;
  const uint32_t high = *(const uint32_t *)(chunk + 64 * (group / 2) + 4 * (row % 16)) >> 4 * (group % 2);
  const uint32_t low = *(const uint32_t *)(chunk + 128 + 4 * (row % 16)) >> 2 * group;
  return (high & 0x0f0f0f0fu) << 2 | (low & 0x03030303u);
}

// A thread a lane of a step.
GPU_KERNEL(kHeadThreads) halo_head_repack(HeadRepackArgs a) {
  let_next_start();
  wait_for_previous();
  const long long at = (long long)block_id() * kHeadThreads + thread_id();
  if (at >= (long long)a.tile_count * a.steps * kWave) return;
  const int lane = (int)(at % kWave), row = (int)(at / kWave / a.steps) * 8 + lane % 8;
  const int first = (int)(at / kWave % a.steps) * (kHeadStepCols / 4) + lane / 8 * 16;
  uint32_t word[12];
  GPU_UNROLL
  for (int i = 0; i < 12; ++i) word[i] = head_file_levels(a, row, first + i);
  GPU_UNROLL
  for (int j = 0; j < 4; ++j) {
    const uint32_t u = head_file_levels(a, row, first + 12 + j);
    word[3 * j] |= (u & 0x03030303u) << 6;
    word[3 * j + 1] |= (u & 0x0c0c0c0cu) << 4;
    word[3 * j + 2] |= (u & 0x30303030u) << 2;
  }
  uint4 *to = a.tiles + at / kWave * kHeadStepWords + lane;
  GPU_UNROLL
  for (int p = 0; p < 3; ++p)
    to[p * kWave] = make_uint4(word[4 * p], word[4 * p + 1], word[4 * p + 2], word[4 * p + 3]);
}

}  // namespace halo
