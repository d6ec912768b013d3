// Attention of many tokens over a KV cache of float16, whose sums have an order: fused multiply-adds along the elements
// for a score, along the positions for a value sum. So no matrix unit; a thread has a position, or an element, of
// several queries at once. The arithmetic is that of engine/kv_forms.py, to the last bit. Device code.
#pragma once
#include "kv.h"
#include "launch.h"
#include "prefill_launch.h"

namespace halo {
namespace prefill {

const int kFloatRows = 16;  // queries of a block of threads: a quarter of a tile

struct FloatWork {
  PrefillTile tile;
  KvHead kv;
  int head, group, first, rows;  // of the tile's queries
  float *queries;                // [kFloatRows][width]
  float *scores;                 // [kFloatRows][256]
  float *tops, *totals, *keep, *take;  // [kFloatRows]
};

GPU_DEVICE FloatWork float_work(const PrefillAttentionArgs &a) {
  FloatWork w;
  w.tile = a.tiles[block_id()];
  w.head = block_y();
  w.kv = kv_head(a.base.kv, w.tile.slot, a.base.layer, w.head, KvStore::f16);
  w.group = a.base.heads / a.base.kv.kv_heads;
  w.first = block_z() * kFloatRows;
  w.rows = w.tile.count * w.group - w.first;
  w.rows = w.rows < kFloatRows ? w.rows : kFloatRows;
  w.scores = (float *)shared_memory();
  w.tops = w.scores + kFloatRows * kBlockOfKv;
  w.totals = w.tops + kFloatRows;
  w.keep = w.totals + kFloatRows;
  w.take = w.keep + kFloatRows;
  w.queries = w.take + kFloatRows;
  return w;
}

// Queries through RoPE, times the attention's scale, filled up with zeros.
GPU_DEVICE void take_float_queries(const AttentionArgs &a, const FloatWork &w) {
  const int width = a.kv.width, size = a.kv.head_dim, half = size / 2;
  for (int i = thread_id(); i < kFloatRows * width; i += kThreads) {
    const int row = i / width + w.first, token = row / w.group, d = i % width;
    float y = 0.0f;
    if (row < w.first + w.rows && d < size) {
      const float *in = a.qkv + (size_t)(w.tile.first + token) * a.qkv_stride + (w.head * w.group + row % w.group) * size;
      const size_t at = (size_t)(w.tile.position + token) * a.rope_row + d % half;
      const float own = taken(in[d], a.status), other = taken(in[d < half ? d + half : d - half], a.status);
      const float cosine = a.rope_cos[at], sine = a.rope_sin[at];
      y = (d < half ? own * cosine - other * sine : own * cosine + other * sine) * a.scale;
    }
    w.queries[i] = y;
  }
}

// A thread has a position of all queries.
GPU_DEVICE void float_scores(const FloatWork &w, int width, int size, int block, int seen) {
  const int j = thread_id();
  if (j >= seen) return;
  float sums[kFloatRows] = {};
  for (int d = 0; d < size; d += 4) {
    const uint4 eight = kv_key_chunk<KvStore::f16>(w.kv, width, block * kBlockOfKv + j, d / 8);
    const uint32_t low = d % 8 ? eight.z : eight.x, high = d % 8 ? eight.w : eight.y;
    const float k[4] = {half_of(low & 0xffff), half_of(low >> 16), half_of(high & 0xffff), half_of(high >> 16)};
    GPU_UNROLL
    for (int r = 0; r < kFloatRows; ++r) {
      const uint4 q = *(const uint4 *)(w.queries + r * width + d);  // zero beyond the head, as are the keys
      sums[r] = fused(float_of(q.x), k[0], sums[r]);
      sums[r] = fused(float_of(q.y), k[1], sums[r]);
      sums[r] = fused(float_of(q.z), k[2], sums[r]);
      sums[r] = fused(float_of(q.w), k[3], sums[r]);
    }
  }
  GPU_UNROLL
  for (int r = 0; r < kFloatRows; ++r) w.scores[r * kBlockOfKv + j] = sums[r];
}

// A half-wave has a query: its lanes are the sixteen of the sum.
GPU_DEVICE void float_weights(const FloatWork &w, int block, int last, int seen) {
  const int r = thread_id() / 16, lane = thread_id() % 16;
  float *scores = w.scores + r * kBlockOfKv;
  int limit = block < last ? kBlockOfKv : w.tile.position % kBlockOfKv + (w.first + r) / w.group + 1;
  limit = limit < seen ? limit : seen;
  float top = scores[0];
  for (int j = lane; j < limit; j += 16) top = scores[j] > top ? scores[j] : top;
  for (int far = 8; far; far /= 2) {
    const float other = shuffle_xor(top, far);
    top = other > top ? other : top;
  }
  float total = 0.0f;
  for (int j = lane; j < (seen + 7) / 8 * 8; j += 16) {
    const float weight = j < limit ? exp_of(scores[j] - top) : 0.0f;
    scores[j] = weight;
    total = total + weight;
  }
  total = add_lanes(total);
  if (lane) return;
  if (block == 0) {
    w.tops[r] = top, w.totals[r] = total;
    return;
  }
  const float old = w.tops[r], most = old > top ? old : top;
  w.keep[r] = exp_of(old - most);
  w.take[r] = exp_of(top - most);
  w.totals[r] = fused(w.totals[r], w.keep[r], total * w.take[r]);
  w.tops[r] = most;
}

// A thread has an element of four queries; what is merged lies in the output, which it alone reads.
GPU_DEVICE void float_values(const AttentionArgs &a, const FloatWork &w, int block, int last, int seen) {
  const int size = a.kv.head_dim;
  for (int item = thread_id(); item < size * kFloatRows / 4; item += kThreads) {
    const int d = item % size, first = item / size * 4;
    if (first >= w.rows) return;
    float sums[4] = {};
    for (int j = 0; j < seen; j += 8) {
      const uint4 eight = kv_value_chunk<KvStore::f16>(w.kv, a.kv.width, block * kBlockOfKv + j, d);
      GPU_UNROLL
      for (int h = 0; h < 2; ++h) {
        const uint32_t low = h ? eight.z : eight.x, high = h ? eight.w : eight.y;
        const float v[4] = {half_of(low & 0xffff), half_of(low >> 16), half_of(high & 0xffff), half_of(high >> 16)};
        GPU_UNROLL
        for (int r = 0; r < 4; ++r) {
          const uint4 p = *(const uint4 *)(w.scores + (first + r) * kBlockOfKv + j + 4 * h);
          sums[r] = fused(float_of(p.x), v[0], sums[r]);
          sums[r] = fused(float_of(p.y), v[1], sums[r]);
          sums[r] = fused(float_of(p.z), v[2], sums[r]);
          sums[r] = fused(float_of(p.w), v[3], sums[r]);
        }
      }
    }
    for (int r = 0; r < 4; ++r) {
      const int in = first + r, row = w.first + in;
      if (in >= w.rows) break;
      float *out = a.out + (size_t)(w.tile.first + row / w.group) * a.out_stride +
                   (w.head * w.group + row % w.group) * size + d;
      float sum = block == 0 ? sums[r] : fused(*out, w.keep[in], sums[r] * w.take[in]);
      *out = block == last ? sum / w.totals[in] : sum;
    }
  }
}

// Grid: tiles, KV heads, quarters of a tile.
GPU_KERNEL(kThreads) halo_prefill_f16(PrefillAttentionArgs a) {
  let_next_start();
  wait_for_previous();
  const FloatWork w = float_work(a);
  if (w.rows <= 0) return;
  take_float_queries(a.base, w);
  sync_block();
  const int last = w.tile.position / kBlockOfKv;
  for (int block = 0; block <= last; ++block) {
    const int seen = block < last ? kBlockOfKv : w.tile.position % kBlockOfKv + w.tile.count;
    float_scores(w, a.base.kv.width, a.base.kv.head_dim, block, seen);
    sync_block();
    float_weights(w, block, last, seen);
    sync_block();
    float_values(a.base, w, block, last, seen);
    sync_block();
  }
}

inline void launch_float_attention(const PrefillAttentionArgs &args, Stream &stream) {
  const size_t shared = 4 * kFloatRows * (size_t)(kBlockOfKv + 4 + args.base.kv.width);
  launch(halo_prefill_f16, {args.tile_count, args.base.kv.kv_heads, kPrefillRows / kFloatRows}, kThreads, shared, stream,
         args);
}

}  // namespace prefill
}  // namespace halo
