// The output head on the device: exact logits of every token, or of the few that matter. To the last bit what cpu/head.cpp
// gives; docs/exact-head.md has the proof, head_launch.h where things lie. Device code.
//
//   norm     final RMSNorm, and the row in 16 bits: a kernel of its own for several tokens, part of the coarse pass for one
//   coarse   all rows at six bits: an upper bound of each logit, and each block's best rows
//   exact    the threshold, the rows that reach it, their logits, the arg max (of logit + noise)
//   near     every row whose logit is near enough to the winner's, in rising order
//   logits   the full head
#pragma once
#include "arithmetic.h"
#include "head_launch.h"
#include "kernels.h"
#include "launch.h"

namespace halo {

const int kHeadThreads = 256;
const int kHeadWaves = kHeadThreads / kWave;
const int kHeadScratch = 256;  // bytes of block-wide sums
const int kHeadAhead = 32;     // weights that a lane has on their way in an exact logit
const float kNoFloat = -__builtin_huge_valf();

GPU_DEVICE int head_filled(int n) { return (n + 15) / 16 * 16; }

// Bytes of 64 columns of kTokens tokens in shared memory: high and low of each, and 16 more, so that the four parts of a
// step lie in different banks.
template <int kTokens>
GPU_DEVICE constexpr int head_chunk() {
  return 128 * kTokens + 16;
}

// ---- the hidden state ----

GPU_DEVICE float head_sum(float x, float *scratch) {
  for (int half = 16; half; half /= 2) x += shuffle_xor(x, half);
  if (lane_id() == 0) scratch[wave_id()] = x;
  sync_block();
  x = 0.0f;
  for (int w = 0; w < kHeadWaves; ++w) x += scratch[w];
  sync_block();
  return x;
}

// x as step * (256 high + low), as Head::coarse_token of the CPU takes it; word i of high is written to high(i).
//
// The lengths are summed in float32 and in units of the step: with z = fl(x / step), |z| <= 32,001, and v = round(z), z - v
// is exact, x = step z (1 + d), |d| <= 2^-24; so |x'| <= step (|z| + |z - v|), |m| <= step (|z - v| + 2^-24 |z|), the latter
// part of which is in the 10 instead of 8 below. These sums of squares and their roots are off by less than 1e-4 in all,
// and the 1.002 has room for that beside what docs/exact-head.md asks of its 1.001.
template <class Store>
GPU_DEVICE HeadToken head_token(const float *row, int n, int steps, uint32_t most_bits, float *scratch, Store store) {
  const float most = most_bits < kInfinityBits ? float_of(most_bits) : 0.0f;
  const bool some = most > 1e-30f;
  const float step = some ? most / 32000.0f : 0.0f;
  const int filled = head_filled(n);
  float length = 0.0f, missed = 0.0f;
  int highs = 0, lows = 0;
  for (int i = thread_id(); i < steps * (kHeadStepCols / 4); i += kHeadThreads) {
    uint32_t high_word = 0, low_word = 0;
    if (some && 4 * i < filled) {
      for (int b = 0; b < 4; ++b) {
        float z = row[4 * i + b] / step, v = nearest(z);
        length = fused(z, z, length);
        missed = fused(z - v, z - v, missed);
        int value = (int)v;
        int high = (value + 128) >> 8, low = value - 256 * high;
        highs += high, lows += low;
        high_word |= (uint32_t)(high & 255) << 8 * b;
        low_word |= (uint32_t)(low & 255) << 8 * b;
      }
    }
    store(i, high_word, low_word);
  }
  length = root(head_sum(length, scratch));
  missed = root(head_sum(missed, scratch));
  HeadToken token = {};
  token.high_sum = block_sum<kHeadThreads>(highs, (uint32_t *)scratch);
  token.low_sum = block_sum<kHeadThreads>(lows, (uint32_t *)scratch);
  token.half_step = step / 2;
  const float width = root((float)n), chain = (float)(filled / 16 + 10) * 5.9604645e-8f;
  if (!some) {  // without a step nothing is known but the length
    token.by_norm = most * width * (1.0f + chain) * 1.002f;
    return token;
  }
  const float taken = step * (length + missed);
  const float floats = 1.9073487e-6f * (taken + 128.0f * step * width);
  token.by_error = (taken + floats) * 1.002f;
  token.by_norm = (step * missed + chain * (step * length) + floats) * 1.002f;
  return token;
}

// Token t through the final norm into `row` (shared); block `writer` keeps it.
template <class Store>
GPU_DEVICE HeadToken head_normed(const HeadNormArgs &a, int t, bool writer, float *row, float *scratch, Store store) {
  const int from = a.wanted ? a.wanted[t] : t;
  const uint32_t most = normed_row<kHeadThreads>(a.x + (size_t)from * a.stride, a.norm, a.n, a.eps, row,
                                                 (uint32_t *)scratch);
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
  const HeadToken token =
      head_normed(a, t, true, scratch + kHeadScratch / 4, scratch, [&](int i, uint32_t high_word, uint32_t low_word) {
        if (!a.parts) return;
        high[i] = high_word;
        high[words + i] = low_word;
      });
  if (thread_id() == 0 && a.parts) a.tokens[t] = token;
}

// ---- the coarse pass ----

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

// Levels of columns 4 i to 4 i + 3 of a lane's 64.
GPU_DEVICE uint32_t head_levels(const HeadLevels &w, int i) {
  if (i < 12) return w.word[i] & 0x3f3f3f3fu;
  const int j = 3 * (i - 12);
  return (w.word[j] >> 6 & 0x03030303u) | (w.word[j + 1] >> 4 & 0x0c0c0c0cu) | (w.word[j + 2] >> 2 & 0x30303030u);
}

// One step of kTiles tiles times the tokens' parts, which lie at `chunk`.
template <int kTokens, int kTiles>
GPU_DEVICE void head_step(const HeadLevels (&w)[kTiles], const uint8_t *chunk, int (&sums)[kTiles][2 * kTokens]) {
  GPU_UNROLL
  for (int q = 0; q < 4; ++q) {
    uint32_t u[kTiles][4];
    GPU_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) u[r][i] = head_levels(w[r], 4 * q + i);
    }
    GPU_UNROLL
    for (int v = 0; v < 2 * kTokens; ++v) {
      const uint4 x = ((const uint4 *)(chunk + 64 * v))[q];
      GPU_UNROLL
      for (int r = 0; r < kTiles; ++r) {
        sums[r][v] = dot4_us(u[r][0], x.x, sums[r][v]);
        sums[r][v] = dot4_us(u[r][1], x.y, sums[r][v]);
        sums[r][v] = dot4_us(u[r][2], x.z, sums[r][v]);
        sums[r][v] = dot4_us(u[r][3], x.w, sums[r][v]);
      }
    }
  }
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

// The bounds of one logit: coarse_bounds in cpu/lanes.inc.h.
GPU_DEVICE void head_bounds(const HeadCoarseArgs &a, const HeadToken &token, int t, int row, const uint4 &facts, int high,
                            int low, HeadBest &best) {
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

// Reads the parts of all tokens into shared memory; tokens beyond the last are the last.
template <int kTokens>
GPU_DEVICE void head_stage(const HeadCoarseArgs &a, uint8_t *x, HeadToken *tokens) {
  const int words = a.own.steps * (kHeadStepCols / 16);  // of 16 bytes, of one vector
  for (int i = thread_id(); i < 2 * kTokens * words; i += kHeadThreads) {
    const int v = i / words, at = i % words, t = v / 2 < a.count ? v / 2 : a.count - 1;
    *(uint4 *)(x + (size_t)(at / 4) * head_chunk<kTokens>() + 64 * v + 16 * (at % 4)) =
        ((const uint4 *)a.parts)[(size_t)(2 * t + v % 2) * words + at];
  }
  if (thread_id() < kTokens) tokens[thread_id()] = a.tokens[thread_id() < a.count ? thread_id() : a.count - 1];
  sync_block();
}

template <int kTokens>
GPU_DEVICE void head_report(const HeadCoarseArgs &a, HeadBest (&best)[(kTokens + 3) / 4], HeadBest *found) {
  const int part = lane_id() / 8;
  GPU_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    HeadBest own = best[t / 4];
    for (int mask = 1; mask < 8; mask *= 2) head_better(own, head_other(own, mask));
    if (part == t % 4 && lane_id() % 8 == 0) found[wave_id() * kTokens + t] = own;
  }
  sync_block();
  const int t = thread_id();
  if (t >= kTokens || t >= a.count) return;
  HeadBest own = found[t];
  for (int w = 1; w < kHeadWaves; ++w) head_better(own, found[w * kTokens + t]);
  a.best[(size_t)t * block_count() + block_id()] = own;
}

// A wave takes neighbouring groups of kTiles tiles: one stream of memory, of which a step is always on its way.
template <int kTokens, int kTiles, bool kOwnNorm>
GPU_DEVICE void head_coarse(const HeadCoarseArgs &a) {
  let_next_start();
  uint8_t *shared = shared_memory();
  float *scratch = (float *)shared;
  HeadToken *tokens = (HeadToken *)(shared + kHeadScratch);
  HeadBest *found = (HeadBest *)(tokens + kTokens);
  uint8_t *x = (uint8_t *)found + (sizeof(HeadBest) * kTokens * kHeadWaves + 15) / 16 * 16;
  const int steps = a.own.steps, part = lane_id() / 8;
  const size_t tile_words = (size_t)steps * kHeadStepWords;
  const long long groups = a.tile_count / kTiles, waves = (long long)block_count() * kHeadWaves;
  const long long wave = (long long)block_id() * kHeadWaves + wave_id();
  const int first = (int)(wave * groups / waves), last = (int)((wave + 1) * groups / waves);
  const uint4 *p = a.tiles + first * kTiles * tile_words + lane_id();
  HeadLevels next[kTiles] = {};
  if (first < last) {
    GPU_UNROLL
    for (int r = 0; r < kTiles; ++r) head_load(p + r * tile_words, next[r]);
  }
  wait_for_previous();
  if (kOwnNorm) {
    float *row = (float *)(x + (size_t)4 * steps * head_chunk<1>());
    const HeadToken token =
        head_normed(a.own, 0, block_id() == 0, row, scratch, [&](int i, uint32_t high, uint32_t low) {
          uint32_t *at = (uint32_t *)(x + (size_t)(i / 16) * head_chunk<1>()) + i % 16;
          at[0] = high;
          at[16] = low;
        });
    if (thread_id() == 0) tokens[0] = token;
    sync_block();
  } else {
    head_stage<kTokens>(a, x, tokens);
  }
  HeadBest best[(kTokens + 3) / 4];
  for (int i = 0; i < (kTokens + 3) / 4; ++i) best[i] = head_nothing();
  for (int group = first; group < last; ++group) {
    uint4 facts[kTiles];
    int sums[kTiles][2 * kTokens];
    GPU_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      facts[r] = a.facts[(group * kTiles + r) * 8 + lane_id() % 8];
      GPU_UNROLL
      for (int v = 0; v < 2 * kTokens; ++v) sums[r][v] = 0;
    }
    for (int s = 0; s < steps; ++s) {
      HeadLevels now[kTiles];
      GPU_UNROLL
      for (int r = 0; r < kTiles; ++r) now[r] = next[r];
      const bool ends = s + 1 == steps;
      if (!ends || group + 1 < last) {
        p += ends ? kHeadStepWords + (kTiles - 1) * tile_words : kHeadStepWords;
        GPU_UNROLL
        for (int r = 0; r < kTiles; ++r) head_load(p + r * tile_words, next[r]);
      }
      head_step<kTokens, kTiles>(now, x + (size_t)(4 * s + part) * head_chunk<kTokens>(), sums);
    }
    GPU_UNROLL
    for (int r = 0; r < kTiles; ++r) {
      const int row = (group * kTiles + r) * 8 + lane_id() % 8;
      GPU_UNROLL
      for (int v = 0; v < 2 * kTokens; ++v) {
        sums[r][v] += shuffle_xor(sums[r][v], 8);
        sums[r][v] += shuffle_xor(sums[r][v], 16);
      }
      GPU_UNROLL
      for (int t = 0; t < kTokens; ++t)
        if (part == t % 4 && row < a.vocab && t < a.count)
          head_bounds(a, tokens[t], t, row, facts[r], sums[r][2 * t], sums[r][2 * t + 1], best[t / 4]);
    }
  }
  head_report<kTokens>(a, best, found);
}

GPU_KERNEL(kHeadThreads) halo_head_coarse_1(HeadCoarseArgs a) { head_coarse<1, 1, true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_coarse_4(HeadCoarseArgs a) { head_coarse<4, 2, false>(a); }
GPU_KERNEL(kHeadThreads) halo_head_coarse_8(HeadCoarseArgs a) { head_coarse<8, 2, false>(a); }

// ---- exact logits ----

template <bool kBf16>
GPU_DEVICE float head_weight(const uint8_t *row, int i) {
  return kBf16 ? float_of((uint32_t)((const uint16_t *)row)[i] << 16) : ((const float *)row)[i];
}

// The logit of one row by a half-wave, whose lanes are the 16 lanes of the sum. Every lane gets it.
template <bool kBf16>
GPU_DEVICE float head_logit(const HeadRows &rows, int id, const float *x, int n) {
  const uint8_t *row = rows.data + (size_t)id * rows.row_bytes;
  const int filled = head_filled(n);
  float sum = 0.0f;
  int i = thread_id() % 16;
  for (; i + 16 * (kHeadAhead - 1) < filled; i += 16 * kHeadAhead) {
    float w[kHeadAhead];
    GPU_UNROLL
    for (int j = 0; j < kHeadAhead; ++j) w[j] = head_weight<kBf16>(row, i + 16 * j);
    GPU_UNROLL
    for (int j = 0; j < kHeadAhead; ++j) sum = fused(w[j], x[i + 16 * j], sum);
  }
  for (; i < filled; i += 16) sum = fused(head_weight<kBf16>(row, i), x[i], sum);
  return add_lanes(sum);
}

GPU_DEVICE float head_any_logit(const HeadRows &rows, int id, const float *x, int n) {
  return rows.bf16 ? head_logit<true>(rows, id, x, n) : head_logit<false>(rows, id, x, n);
}

// The value and the id as one number. Zero of either sign is one value; without an id it is 0.
GPU_DEVICE uint64_t head_key(float value, int id) {
  uint32_t bits = bits_of(value + 0.0f);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (uint32_t)~id;
}
GPU_DEVICE float head_value(uint64_t key) {
  const uint32_t bits = (uint32_t)(key >> 32);
  return float_of(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// The best of all blocks of the coarse pass; `found`: shared, one of each wave.
GPU_DEVICE HeadBest head_best(const HeadExactArgs &a, int t, HeadBest *found) {
  HeadBest best = head_nothing();
  for (int i = thread_id(); i < a.best_count; i += kHeadThreads) head_better(best, a.best[(size_t)t * a.best_count + i]);
  for (int mask = 1; mask < kWave; mask *= 2) head_better(best, head_other(best, mask));
  if (lane_id() == 0) found[wave_id()] = best;
  sync_block();
  best = found[0];
  for (int w = 1; w < kHeadWaves; ++w) head_better(best, found[w]);
  return best;
}

// Rows of a block of the exact pass: a multiple of 4, so that their bounds are read 16 bytes at a time.
struct HeadRange {
  int first, last;
};
GPU_DEVICE HeadRange head_range(int vocab) {
  const long long fours = (vocab + 3) / 4, count = block_count();
  const int last = (int)(4 * (fours * (block_id() + 1) / count));
  return {(int)(4 * (fours * block_id() / count)), last < vocab ? last : vocab};
}

struct HeadShared {
  HeadBest found[kHeadWaves];
  int32_t count, is_last;
  int32_t list[kHeadRowsInTurn];
  float values[kHeadThreads];
  uint32_t scratch[kHeadWaves];
};

GPU_DEVICE void head_read_row(const float *from, int n, float *x) {
  for (int i = thread_id(); i < head_filled(n) / 4; i += kHeadThreads) ((uint4 *)x)[i] = ((const uint4 *)from)[i];
}

// Whether this is the last block of its token to come here. The block meets.
GPU_DEVICE bool head_last(int32_t *done, int32_t *is_last) {
  fence();
  sync_block();
  if (thread_id() == 0) *is_last = atomic_add(done, 1) == block_count() - 1;
  sync_block();
  fence();
  return *is_last != 0;
}

GPU_DEVICE void head_finish(const HeadExactArgs &a, int t) {
  HeadSearch &search = a.search[t];
  const uint64_t key = atomic_max(&search.largest, (uint64_t)0);
  const bool good = key && finite(head_value(key));
  if (!good) atomic_or(a.status, kNotFinite);
  search.winner = good ? (int32_t)~(uint32_t)key : -1;
  a.ids[t] = search.winner;
  if (a.none_found) a.none_found[t] = -1;
  search.largest = 0;
  search.done = 0;
}

GPU_KERNEL(kHeadThreads) halo_head_exact(HeadExactArgs a) {
  let_next_start();
  wait_for_previous();
  HeadShared &own = *(HeadShared *)shared_memory();
  float *x = (float *)(shared_memory() + (sizeof(HeadShared) + 15) / 16 * 16);
  const int t = block_y(), half = thread_id() / 16 % 2;
  const HeadRange range = head_range(a.vocab);
  const float *noise = a.noise ? a.noise + (size_t)t * a.vocab : nullptr;
  if (thread_id() == 0) own.count = 0;
  head_read_row(a.kept + (size_t)t * a.kept_stride, a.n, x);
  const HeadBest best = head_best(a, t, own.found);
  float threshold;
  if (noise) {
    threshold = head_any_logit(a.rows, best.drawn_row, x, a.n) + noise[best.drawn_row];
  } else {
    threshold = head_any_logit(a.rows, best.seen_row, x, a.n);
    if (best.certain > threshold) threshold = best.certain;
  }
  uint64_t key = 0;
  bool bad = false;
  for (int start = range.first; start < range.last; start += kHeadRowsInTurn) {
    const int row = start + 4 * thread_id();
    if (row < range.last) {
      const uint4 four = *(const uint4 *)(a.upper + (size_t)t * a.upper_stride + row);
      const uint32_t bits[4] = {four.x, four.y, four.z, four.w};
      GPU_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (row + i >= range.last) continue;
        const float upper = float_of(bits[i]) + (noise ? noise[row + i] : 0.0f);
        if (!(upper < threshold)) own.list[atomic_add(&own.count, 1)] = row + i;
      }
    }
    sync_block();
    const int count = own.count;
    for (int i = 2 * wave_id(); i < count; i += 2 * kHeadWaves) {
      const int id = own.list[i + half < count ? i + half : i];
      const float logit = head_any_logit(a.rows, id, x, a.n);
      bad = bad || !finite(logit);
      const uint64_t new_key = head_key(logit + (noise ? noise[id] : 0.0f), id);
      key = new_key > key ? new_key : key;
    }
    sync_block();
    if (thread_id() == 0) own.count = 0;
    sync_block();
  }
  if (thread_id() % 16 == 0) {
    if (bad) atomic_or(a.status, kNotFinite);
    if (key) atomic_max(&a.search[t].largest, key);
  }
  if (head_last(&a.search[t].done, &own.is_last) && thread_id() == 0) head_finish(a, t);
}

// ---- what is near the winner ----

// The sum of `value` over the threads before this one, and in *all over all of them. The block meets.
GPU_DEVICE int head_rank(int value, uint32_t *scratch, int *all) {
  int rank = value;
  for (int d = 1; d < kWave; d *= 2) {
    const int before = (int)shuffle((uint32_t)rank, lane_id() >= d ? lane_id() - d : 0);
    if (lane_id() >= d) rank += before;
  }
  if (lane_id() == kWave - 1) scratch[wave_id()] = (uint32_t)rank;
  sync_block();
  *all = 0;
  for (int w = 0; w < kHeadWaves; ++w) {
    if (w == wave_id()) rank += *all;
    *all += (int)scratch[w];
  }
  sync_block();
  return rank - value;
}

// The last block puts together what all have found, a thread what one block has.
GPU_DEVICE void head_gather(const HeadNearArgs &a, int t, uint32_t *scratch) {
  const long long fours = (a.exact.vocab + 3) / 4, blocks = block_count();
  int total = 0;
  for (int first = 0; first < blocks; first += kHeadThreads) {
    const int b = first + thread_id(), count = b < blocks ? a.counts[t * blocks + b] : 0;
    int all;
    const int before = total + head_rank(count, scratch, &all);
    const size_t from = (size_t)t * a.exact.vocab + 4 * (fours * b / blocks), to = (size_t)t * a.stride + before;
    if (before + count <= a.room)
      for (int i = 0; i < count; ++i) {
        a.ids[to + i] = a.some_ids[from + i];
        a.logits[to + i] = a.some_logits[from + i];
      }
    total = total + all <= a.room ? total + all : a.room + 1;
  }
  if (thread_id() == 0) a.found[t] = total > a.room ? -1 : total;
}

GPU_KERNEL(kHeadThreads) halo_head_near(HeadNearArgs a) {
  let_next_start();
  wait_for_previous();
  HeadShared &own = *(HeadShared *)shared_memory();
  float *x = (float *)(shared_memory() + (sizeof(HeadShared) + 15) / 16 * 16);
  const int t = block_y(), half = thread_id() / 16 % 2, vocab = a.exact.vocab, n = a.exact.n;
  const HeadRange range = head_range(vocab);
  head_read_row(a.exact.kept + (size_t)t * a.exact.kept_stride, n, x);
  const HeadBest best = head_best(a.exact, t, own.found);
  const int winner = a.exact.search[t].winner;
  int kept = 0;
  if (winner >= 0) {
    // The winner by the lower half of each wave, the row that looks best by the upper.
    const float logit = head_any_logit(a.exact.rows, half ? best.seen_row : winner, x, n);
    const float other = shuffle_xor(logit, 16), won = half ? other : logit;
    const float deep = (half ? logit : other) - *a.depth;
    const float least = deep < won ? deep : won;
    const size_t to = (size_t)t * vocab + range.first;
    bool bad = false;
    for (int start = range.first; start < range.last && kept <= a.room; start += kHeadThreads) {
      const int row = start + thread_id();
      const bool near = row < range.last && !(a.exact.upper[(size_t)t * a.exact.upper_stride + row] < least);
      int count, found;
      const int rank = head_rank(near, own.scratch, &count);
      if (near) own.list[rank] = row;
      sync_block();
      for (int i = 2 * wave_id(); i < count; i += 2 * kHeadWaves) {
        const int at = i + half < count ? i + half : i;
        const float value = head_any_logit(a.exact.rows, own.list[at], x, n);
        bad = bad || !finite(value);
        if (thread_id() % 16 == 0) own.values[at] = value;
      }
      sync_block();
      const bool keeps = thread_id() < count && !(own.values[thread_id()] < least);
      const int place = kept + head_rank(keeps, own.scratch, &found);
      if (keeps) {
        a.some_ids[to + place] = own.list[thread_id()];
        a.some_logits[to + place] = own.values[thread_id()];
      }
      kept += found;
      sync_block();
    }
    if (bad && thread_id() % 16 == 0) atomic_or(a.exact.status, kNotFinite);
  }
  if (thread_id() == 0) a.counts[(size_t)t * block_count() + block_id()] = winner >= 0 ? kept : a.room + 1;
  if (!head_last(&a.exact.search[t].near_done, &own.is_last)) return;
  head_gather(a, t, own.scratch);
  if (thread_id() == 0) a.exact.search[t].near_done = 0;
}

// ---- all logits ----

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

// ---- the coarse head's layout ----

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

// ---- launches ----

inline size_t head_row_bytes(int n) { return (size_t)(n + 15) / 16 * 64; }

size_t head_norm_shared(int n) { return kHeadScratch + head_row_bytes(n); }

size_t head_coarse_shared(int n, int tokens) {
  const size_t steps = (size_t)(n + kHeadStepCols - 1) / kHeadStepCols;
  const size_t fixed = kHeadScratch + tokens * sizeof(HeadToken) + (tokens * kHeadWaves * sizeof(HeadBest) + 15) / 16 * 16;
  return fixed + 4 * steps * (128 * tokens + 16) + (tokens == 1 ? head_row_bytes(n) : 0);
}

size_t head_exact_shared(int n) { return (sizeof(HeadShared) + 15) / 16 * 16 + head_row_bytes(n); }

size_t head_logits_shared(int n, int tokens) { return tokens * head_row_bytes(n); }

void launch_head_repack(const HeadRepackArgs &args, Stream &stream) {
  const long long threads = (long long)args.tile_count * args.steps * kWave;
  launch(halo_head_repack, {(int)((threads + kHeadThreads - 1) / kHeadThreads)}, kHeadThreads, 0, stream, args);
}

void launch_head_norm(const HeadNormArgs &args, int tokens, Stream &stream) {
  launch(halo_head_norm, {tokens}, kHeadThreads, head_norm_shared(args.n), stream, args);
}

void launch_head_coarse(const HeadCoarseArgs &args, int blocks, Stream &stream) {
  const int tokens = head_pass_tokens(args.count);
  launch(tokens == 8 ? halo_head_coarse_8 : tokens == 4 ? halo_head_coarse_4 : halo_head_coarse_1, {blocks}, kHeadThreads,
         head_coarse_shared(args.own.n, tokens), stream, args);
}

void launch_head_exact(const HeadExactArgs &args, int tokens, int blocks, Stream &stream) {
  launch(halo_head_exact, {blocks, tokens}, kHeadThreads, head_exact_shared(args.n), stream, args);
}

void launch_head_near(const HeadNearArgs &args, int tokens, int blocks, Stream &stream) {
  launch(halo_head_near, {blocks, tokens}, kHeadThreads, head_exact_shared(args.exact.n), stream, args);
}

void launch_head_logits(const HeadLogitsArgs &args, int blocks, Stream &stream) {
  const int tokens = head_pass_tokens(args.count);
  const size_t shared = head_logits_shared(args.n, tokens);
  if (args.rows.bf16)
    launch(tokens == 8 ? halo_head_logits_8_bf16 : tokens == 4 ? halo_head_logits_4_bf16 : halo_head_logits_1_bf16, {blocks},
           kHeadThreads, shared, stream, args);
  else
    launch(tokens == 8 ? halo_head_logits_8_f32 : tokens == 4 ? halo_head_logits_4_f32 : halo_head_logits_1_f32, {blocks},
           kHeadThreads, shared, stream, args);
}

}  // namespace halo
