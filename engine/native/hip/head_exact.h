// Exact logits of the few rows that matter: the arg max of a token (with noise, or not), and what is near it. A row is
// taken by a half-wave, whose lanes are the 16 lanes of the defined sum. Device code.
#pragma once
#include "head_many.h"

namespace halo {

const int kHeadOwnRows = kHeadRowsInTurn / kHeadThreads;
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
  float values[kHeadRowsInTurn];
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

// The upper bounds of a thread's rows of a turn, neighbours.
struct HeadUppers {
  uint4 piece[kHeadOwnRows / 4];
};
GPU_DEVICE HeadUppers head_uppers(const float *upper, int row, int last) {
  HeadUppers u = {};
  GPU_UNROLL
  for (int i = 0; i < kHeadOwnRows / 4; ++i)
    if (row + 4 * i < last) u.piece[i] = *(const uint4 *)(upper + row + 4 * i);
  return u;
}

// Which of these rows can reach a value: one that is no number can.
GPU_DEVICE uint32_t head_reaching(const HeadUppers &u, const float *noise, int row, int last, float value) {
  uint32_t mask = 0;
  GPU_UNROLL
  for (int i = 0; i < kHeadOwnRows; ++i) {
    if (row + i >= last) continue;
    const uint4 &four = u.piece[i / 4];
    const uint32_t bits = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
    const float upper = float_of(bits) + (noise ? noise[row + i] : 0.0f);
    mask |= (uint32_t)!(upper < value) << i;
  }
  return mask;
}

GPU_DEVICE int head_count(uint32_t mask) {
  int count = 0;
  GPU_UNROLL
  for (int i = 0; i < kHeadOwnRows; ++i) count += (int)(mask >> i & 1);
  return count;
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
  const float *upper = a.upper + (size_t)t * a.upper_stride;
  int row = range.first + kHeadOwnRows * thread_id();
  HeadUppers uppers = head_uppers(upper, row, range.last);
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
    const uint32_t mask = head_reaching(uppers, noise, row, range.last, threshold);
    if (mask) {
      int at = atomic_add(&own.count, head_count(mask));
      for (int i = 0; i < kHeadOwnRows; ++i)
        if (mask >> i & 1) own.list[at++] = row + i;
    }
    row += kHeadRowsInTurn;
    uppers = head_uppers(upper, row, range.last);
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

// The value that a token near the winner has at least: the winner's own, or `depth` below the row that looks best.
template <bool kBf16>
GPU_DEVICE float head_least(const HeadNearArgs &a, int winner, int looks_best, const float *x) {
  const int half = thread_id() / 16 % 2, id = half ? looks_best : winner;  // one by either half of each wave
  head_prefetch_row(a.exact.rows, id);
  const float logit = head_logit<kBf16>(a.exact.rows, id, x, a.exact.n);
  const float other = shuffle_xor(logit, 16), won = half ? other : logit, deep = (half ? logit : other) - *a.depth;
  return deep < won ? deep : won;
}

// Those of own.list, whose values are there, that are at least `least`, in order; how many they are.
GPU_DEVICE int head_keep(HeadShared &own, int count, float least, int32_t *ids, float *logits) {
  const int each = (count + kHeadThreads - 1) / kHeadThreads, first = thread_id() * each;
  uint32_t mask = 0;
  for (int i = 0; i < each && first + i < count; ++i) mask |= (uint32_t)!(own.values[first + i] < least) << i;
  int all, at = head_rank(head_count(mask), own.scratch, &all);
  for (int i = 0; i < each; ++i) {
    if (!(mask >> i & 1)) continue;
    ids[at] = own.list[first + i];
    logits[at++] = own.values[first + i];
  }
  return all;
}

template <bool kBf16>
GPU_DEVICE int head_near_rows(const HeadNearArgs &a, int t, float least, const float *x, HeadShared &own) {
  const HeadRange range = head_range(a.exact.vocab);
  const int half = thread_id() / 16 % 2;
  const float *upper = a.exact.upper + (size_t)t * a.exact.upper_stride;
  const size_t to = (size_t)t * a.exact.vocab + range.first;
  int kept = 0;
  bool bad = false;
  for (int start = range.first; start < range.last && kept <= a.room; start += kHeadRowsInTurn) {
    const int row = start + kHeadOwnRows * thread_id();
    const uint32_t mask = head_reaching(head_uppers(upper, row, range.last), nullptr, row, range.last, least);
    int count, at = head_rank(head_count(mask), own.scratch, &count);
    for (int i = 0; i < kHeadOwnRows; ++i)
      if (mask >> i & 1) own.list[at++] = row + i;
    sync_block();
    for (int i = 2 * wave_id(); i < count; i += 2 * kHeadWaves) {
      const int in = i + half < count ? i + half : i;
      const float value = head_logit<kBf16>(a.exact.rows, own.list[in], x, a.exact.n);
      bad = bad || !finite(value);
      if (thread_id() % 16 == 0) own.values[in] = value;
    }
    sync_block();
    kept += head_keep(own, count, least, a.some_ids + to + kept, a.some_logits + to + kept);
    sync_block();
  }
  if (bad && thread_id() % 16 == 0) atomic_or(a.exact.status, kNotFinite);
  return kept;
}

template <bool kBf16>
GPU_DEVICE void head_near(const HeadNearArgs &a) {
  let_next_start();
  wait_for_previous();
  HeadShared &own = *(HeadShared *)shared_memory();
  float *x = (float *)(shared_memory() + (sizeof(HeadShared) + 15) / 16 * 16);
  const int t = block_y();
  head_read_row(a.exact.kept + (size_t)t * a.exact.kept_stride, a.exact.n, x);
  const HeadBest best = head_best(a.exact, t, own.found);
  const int winner = a.exact.search[t].winner;
  int kept = a.room + 1;  // without a winner nothing is found
  if (winner >= 0) {
    const float least = head_least<kBf16>(a, winner, best.seen_row, x);
    kept = head_near_rows<kBf16>(a, t, least, x, own);
  }
  if (thread_id() == 0) a.counts[(size_t)t * block_count() + block_id()] = kept;
  if (!head_last(&a.exact.search[t].near_done, &own.is_last)) return;
  head_gather(a, t, own.scratch);
  if (thread_id() == 0) a.exact.search[t].near_done = 0;
}

GPU_KERNEL(kHeadThreads) halo_head_near_bf16(HeadNearArgs a) { head_near<true>(a); }
GPU_KERNEL(kHeadThreads) halo_head_near_f32(HeadNearArgs a) { head_near<false>(a); }

}  // namespace halo
