// Exact logits of the few rows that matter: the arg max of a token (with noise, or not), and what is near it. A row is
// taken by a half-wave, whose lanes are the 16 lanes of the defined sum. Device code.
#pragma once
#include "head_coarse.h"

namespace halo {

const int kHeadAhead = 80;  // weights that a lane has on their way: a row of 2,560 comes in two turns

template <bool kBf16>
GPU_DEVICE float head_weight(const uint8_t *row, int i) {
  return kBf16 ? float_of((uint32_t)((const uint16_t *)row)[i] << 16) : ((const float *)row)[i];
}

// The logit of one row by a half-wave, whose lanes are the 16 lanes of the sum. Every lane gets it.
// A row that is wanted soon, by a half-wave.
GPU_DEVICE void head_prefetch_row(const HeadRows &rows, int id) {
  const uint8_t *row = rows.data + (size_t)id * rows.row_bytes;
  for (size_t at = 0; at < rows.row_bytes; at += 128 * 16)
    if (at + thread_id() % 16 * 128 < rows.row_bytes) head_prefetch(row + at + thread_id() % 16 * 128);
}

// The logit of one row. Every lane gets it.
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
    sync_wave();  // all of them now: compilers would rather have few registers
    GPU_UNROLL
    for (int j = 0; j < kHeadAhead; ++j) sum = fused(w[j], x[i + 16 * j], sum);
  }
  for (; i + 16 * 7 < filled; i += 16 * 8) {
    float w[8];
    GPU_UNROLL
    for (int j = 0; j < 8; ++j) w[j] = head_weight<kBf16>(row, i + 16 * j);
    GPU_UNROLL
    for (int j = 0; j < 8; ++j) sum = fused(w[j], x[i + 16 * j], sum);
  }
  for (; i < filled; i += 16) sum = fused(head_weight<kBf16>(row, i), x[i], sum);
  return add_lanes(sum);
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
  const HeadBest *all = a.best + (size_t)t * a.best_count;
  for (int i = thread_id(); i < a.best_count; i += kHeadThreads) head_better(best, all[i]);
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

template <bool kBf16>
GPU_DEVICE void head_exact(const HeadExactArgs &a) {
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
  // By each wave: the row that looks best, exactly; without noise also what is certain of any other.
  const int looks_best = noise ? best.drawn_row : best.seen_row;
  head_prefetch_row(a.rows, looks_best);
  float threshold = head_logit<kBf16>(a.rows, looks_best, x, a.n) + (noise ? noise[looks_best] : 0.0f);
  if (!noise && best.certain > threshold) threshold = best.certain;
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
    for (int i = thread_id() / 16; i < count && i < 4 * kHeadWaves; i += 2 * kHeadWaves)
      head_prefetch_row(a.rows, own.list[i]);
    for (int i = 2 * wave_id(); i < count; i += 2 * kHeadWaves) {
      const int id = own.list[i + half < count ? i + half : i];
      const float logit = head_logit<kBf16>(a.rows, id, x, a.n);
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

GPU_KERNEL(kHeadThreads) halo_head_exact_bf16(HeadExactArgs a) { head_exact<true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_exact_f32(HeadExactArgs a) { head_exact<false>(a); }

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

template <bool kBf16>
GPU_DEVICE void head_near(const HeadNearArgs &a) {
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
    head_prefetch_row(a.exact.rows, half ? best.seen_row : winner);
    // The winner by the lower half of each wave, the row that looks best by the upper.
    const float logit = head_logit<kBf16>(a.exact.rows, half ? best.seen_row : winner, x, n);
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
        const float value = head_logit<kBf16>(a.exact.rows, own.list[at], x, n);
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

GPU_KERNEL(kHeadThreads) halo_head_near_bf16(HeadNearArgs a) { head_near<true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_near_f32(HeadNearArgs a) { head_near<false>(a); }

}  // namespace halo
