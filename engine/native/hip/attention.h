// Attention over the KV cache for the tokens of a decode step: split over blocks of 256 positions, put together by
// whichever block of threads comes last. The arithmetic is that of cpu/attention.inc.h and engine/kv_forms.py, to the
// last bit. Device code.
#pragma once
#include "kv.h"
#include "launch.h"

namespace halo {

// What one block of threads holds in shared memory. Queries as the form wants them: int8 [group][width] or float.
struct AttentionRoom {
  uint32_t *scratch;  // kScratchBytes
  float *raw;         // [max(group, 2)][width]: queries, or the new key and value, as floats
  int8_t *q8;         // [group][width]
  float *q_scales;    // [group]
  float *scores;      // [group][256]
  float *tops, *totals, *units;  // [group]
  uint8_t *high, *low;           // [group][256]: bytes of the weights
  int *sums;                     // [group][width]
};

GPU_DEVICE AttentionRoom attention_room(uint8_t *shared, int group, int width) {
  AttentionRoom r;
  const int rows = group > 2 ? group : 2;
  r.scratch = (uint32_t *)shared;
  r.raw = (float *)(shared + 256);
  r.scores = r.raw + rows * width;
  r.sums = (int *)(r.scores + group * kBlockOfKv);
  r.q_scales = (float *)(r.sums + group * width);
  r.tops = r.q_scales + kMostGroup;
  r.totals = r.tops + kMostGroup;
  r.units = r.totals + kMostGroup;
  r.q8 = (int8_t *)(r.units + kMostGroup);
  r.high = (uint8_t *)r.q8 + group * width;
  r.low = r.high + group * kBlockOfKv;
  return r;
}

inline size_t attention_shared(int group, int width) {
  const int rows = group > 2 ? group : 2;
  return 256 + (size_t)4 * (rows * width + group * kBlockOfKv + group * width + 4 * kMostGroup) + group * width +
         2 * group * kBlockOfKv;
}

// Scores of this block's positions: a thread a position, all query heads of the group, four at a time.
template <KvStore kForm>
GPU_DEVICE void block_scores(const AttentionArgs &a, const AttentionRoom &r, const KvHead &kv, int block, int limit,
                             int group) {
  const int width = a.kv.width;
  for (int j = thread_id(); j < limit; j += kThreads) {
    const int position = block * kBlockOfKv + j;
    for (int first = 0; first < group; first += 4) {
      const int some = group - first < 4 ? group - first : 4;
      if (kForm == KvStore::f16) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int d = 0; d < width; d += 8) {
          uint4 eight = kv_key_chunk<kForm>(kv, width, position, d / 8);
          GPU_UNROLL
          for (int e = 0; e < 8; ++e) {
            float k = half_of(word_at(eight, e / 2) >> 16 * (e % 2));
            if (d + e < a.kv.head_dim)
              for (int g = 0; g < 4; ++g)
                if (g < some) sum[g] = fused(r.raw[(first + g) * width + d + e], k, sum[g]);
          }
        }
        for (int g = 0; g < some; ++g) r.scores[(first + g) * kBlockOfKv + j] = sum[g];
        continue;
      }
      int sum[4] = {0, 0, 0, 0};
      for (int d = 0; d < width; d += 16) {
        uint4 sixteen = kv_key_chunk<kForm>(kv, width, position, d / 16);
        GPU_UNROLL
        for (int g = 0; g < 4; ++g) {
          if (g < some) {
            uint4 q = *(const uint4 *)(r.q8 + (first + g) * width + d);
            sum[g] = dot4_ss(sixteen.x, q.x, sum[g]);
            sum[g] = dot4_ss(sixteen.y, q.y, sum[g]);
            sum[g] = dot4_ss(sixteen.z, q.z, sum[g]);
            sum[g] = dot4_ss(sixteen.w, q.w, sum[g]);
          }
        }
      }
      const float scale = kv.key_scales[position];
      for (int g = 0; g < some; ++g)
        r.scores[(first + g) * kBlockOfKv + j] = (float)sum[g] * scale * r.q_scales[first + g];
    }
  }
}

// Scores to weights, a wave a head: their largest score, their sum in 16 lanes, and of the integer forms the bytes of the
// weights in 15 bits of their largest.
template <KvStore kForm>
GPU_DEVICE void block_weights(const AttentionRoom &r, const KvHead &kv, int block, int limit, int group) {
  const int lane = lane_id();
  for (int g = wave_id(); g < group; g += kThreads / kWave) {
    float *scores = r.scores + g * kBlockOfKv;
    float top = scores[0];
    for (int j = lane; j < limit; j += kWave) top = scores[j] > top ? scores[j] : top;
    for (int half = 16; half; half /= 2) {
      float other = shuffle_xor(top, half);
      top = other > top ? other : top;
    }
    for (int j = lane; j < kBlockOfKv; j += kWave) scores[j] = j < limit ? exp_of(scores[j] - top) : 0.0f;
    sync_wave();
    float sum = 0.0f;
    for (int j = lane % 16; j < limit; j += 16) sum = sum + scores[j];
    sum = add_lanes(sum);
    if (lane == 0) r.tops[g] = top, r.totals[g] = sum;
    if (kForm == KvStore::f16) continue;
    float most = 1e-30f;
    const float *scales = kv.value_scales + block * kBlockOfKv;
    for (int j = lane; j < limit; j += kWave) {
      float w = scores[j] * scales[j];
      most = w > most ? w : most;
    }
    for (int half = 16; half; half /= 2) {
      float other = shuffle_xor(most, half);
      most = other > most ? other : most;
    }
    const float factor = 32767.0f / most;
    for (int j = lane; j < kBlockOfKv; j += kWave) {
      int w = j < limit ? (int)nearest(scores[j] * scales[j] * factor) : 0;
      r.high[g * kBlockOfKv + j] = (uint8_t)(w >> 8);
      r.low[g * kBlockOfKv + j] = (uint8_t)w;
    }
    if (lane == 0) r.units[g] = most / 32767.0f;
  }
}

// Sums of weight * value to `out` [group][width]: floats.
template <KvStore kForm>
GPU_DEVICE void block_values(const AttentionArgs &a, const AttentionRoom &r, const KvHead &kv, int block, int limit,
                             int group, float *out, int out_row) {
  const int width = a.kv.width;
  if (kForm == KvStore::f16) {
    for (int i = thread_id(); i < group * width; i += kThreads) {
      const int g = i / width, d = i % width;
      float sum = 0.0f;
      for (int j = 0; j < limit; j += 8) {
        uint4 eight = kv_value_chunk<kForm>(kv, width, block * kBlockOfKv + j, d);
        GPU_UNROLL
        for (int e = 0; e < 8; ++e)
          if (j + e < limit)
            sum = fused(r.scores[g * kBlockOfKv + j + e], half_of(word_at(eight, e / 2) >> 16 * (e % 2)), sum);
      }
      out[g * out_row + d] = sum;
    }
    sync_block();
    return;
  }
  // Threads share the positions as well as the elements: whole numbers may be added in any order.
  const int chunks = (limit + 15) / 16;
  const int parts = kThreads / width > 1 ? kThreads / width : 1;
  for (int i = thread_id(); i < group * width; i += kThreads) r.sums[i] = 0;
  sync_block();
  for (int i = thread_id(); i < parts * width; i += kThreads) {
    const int d = i % width, part = i / width;
    for (int first = 0; first < group; first += 4) {
      const int some = group - first < 4 ? group - first : 4;
      int high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
      for (int c = part; c < chunks; c += parts) {
        uint4 v = kv_value_chunk<kForm>(kv, width, block * kBlockOfKv + 16 * c, d);
        GPU_UNROLL
        for (int g = 0; g < 4; ++g) {
          if (g < some) {
            uint4 h = ((const uint4 *)(r.high + (first + g) * kBlockOfKv))[c];
            uint4 l = ((const uint4 *)(r.low + (first + g) * kBlockOfKv))[c];
            GPU_UNROLL
            for (int k = 0; k < 4; ++k) {
              high[g] = dot4_us(word_at(h, k), word_at(v, k), high[g]);
              low[g] = dot4_us(word_at(l, k), word_at(v, k), low[g]);
            }
          }
        }
      }
      for (int g = 0; g < some; ++g) atomic_add(r.sums + (first + g) * width + d, 256 * high[g] + low[g]);
    }
  }
  sync_block();
  for (int i = thread_id(); i < group * width; i += kThreads) {
    const int g = i / width, d = i % width;
    out[g * out_row + d] = (float)r.sums[i] * r.units[g];
  }
  sync_block();
}

// Sums of all blocks to the row of the output: divided by the total, turned back where the form turned them.
template <KvStore kForm>
GPU_DEVICE void finish_heads(const AttentionArgs &a, const AttentionRoom &r, float *sums, int sums_row, int token,
                             int head, int group) {
  const int width = a.kv.width, size = a.kv.head_dim;
  for (int i = thread_id(); i < group * width; i += kThreads)
    r.raw[i] = sums[i / width * sums_row + i % width] / r.totals[i / width];
  sync_block();
  if (kForm == KvStore::rotor3) {
    for (int g = 0; g < group; ++g) turn_back<kThreads>(r.raw + g * width, width);
    const float shorter = 1.0f / (float)size;
    for (int i = thread_id(); i < group * width; i += kThreads) r.raw[i] = r.raw[i] * shorter;
    sync_block();
  }
  float *out = a.out + (size_t)token * a.out_stride + head * group * size;
  for (int i = thread_id(); i < group * size; i += kThreads) out[i] = r.raw[i / size * width + i % size];
}

// Merge what the blocks of one (token, KV head) have left, in rising order.
template <KvStore kForm>
GPU_DEVICE void merge_blocks(const AttentionArgs &a, const AttentionRoom &r, const float *partial, size_t block_row,
                             int blocks, int token, int head, int group) {
  const int width = a.kv.width, row = width + 2;
  // Each thread has the same elements throughout: d of a head, or its total (element width).
  for (int i = thread_id(); i < group * (width + 1); i += kThreads) {
    const int g = i / (width + 1), d = i % (width + 1);
    const float *own = partial + g * row;
    float top = own[width], sum = d < width ? own[d] : own[width + 1];
    for (int b = 1; b < blocks; ++b) {
      const float *next = own + b * block_row;
      float block_top = next[width], value = d < width ? next[d] : next[width + 1];
      float most = top > block_top ? top : block_top;
      sum = fused(sum, exp_of(top - most), value * exp_of(block_top - most));
      top = most;
    }
    if (d < width) r.scores[g * width + d] = sum;
    if (d == width) r.totals[g] = sum;
  }
  sync_block();
  finish_heads<kForm>(a, r, r.scores, width, token, head, group);
}

// Grid: blocks of positions, KV heads, tokens.
template <KvStore kForm>
GPU_DEVICE void attend(const AttentionArgs &a) {
  let_next_start();
  wait_for_previous();
  const int block = block_id(), head = block_y(), token = block_z();
  const int position = a.positions[token], slot = a.slots[token];
  const int blocks = position / kBlockOfKv + 1;
  if (block >= blocks) return;
  const int group = a.heads / a.kv.kv_heads, width = a.kv.width;
  const int limit = block + 1 < blocks ? kBlockOfKv : position % kBlockOfKv + 1;
  const AttentionRoom r = attention_room(shared_memory(), group, width);
  const KvHead kv = kv_head(a.kv, slot, a.layer, head, kForm);
  if (a.append && block + 1 == blocks) {
    append_token<kForm>(a, kv, token, head, r.raw);
    fence();
    sync_block();
  }
  prepare_queries<kForm>(a, token, head, group, r.raw, r.q8, r.q_scales);
  block_scores<kForm>(a, r, kv, block, limit, group);
  sync_block();
  block_weights<kForm>(r, kv, block, limit, group);
  sync_block();
  if (blocks == 1) {
    block_values<kForm>(a, r, kv, block, limit, group, (float *)r.sums, width);  // in place: each thread its own
    finish_heads<kForm>(a, r, (float *)r.sums, width, token, head, group);
    return;
  }
  const size_t row = width + 2, block_row = (size_t)group * row;
  float *partial = a.partial + ((size_t)token * a.kv.kv_heads + head) * a.blocks * block_row;
  block_values<kForm>(a, r, kv, block, limit, group, partial + block * block_row, (int)row);
  for (int g = thread_id(); g < group; g += kThreads) {
    partial[block * block_row + g * row + width] = r.tops[g];
    partial[block * block_row + g * row + width + 1] = r.totals[g];
  }
  fence();
  sync_block();
  int32_t *count = a.counts + token * a.kv.kv_heads + head;
  if (thread_id() == 0) r.scratch[0] = (uint32_t)atomic_add(count, 1);
  sync_block();
  if ((int)r.scratch[0] + 1 < blocks) return;
  fence();
  if (thread_id() == 0) *count = 0;
  merge_blocks<kForm>(a, r, partial, block_row, blocks, token, head, group);
}

// Grid: tokens, KV heads.
template <KvStore kForm>
GPU_DEVICE void append(const AttentionArgs &a) {
  let_next_start();
  wait_for_previous();
  const int token = block_id(), head = block_y();
  const AttentionRoom r = attention_room(shared_memory(), a.heads / a.kv.kv_heads, a.kv.width);
  const KvHead kv = kv_head(a.kv, a.slots[token], a.layer, head, kForm);
  append_token<kForm>(a, kv, token, head, r.raw);
}

GPU_KERNEL(kThreads) halo_attend_f16(AttentionArgs a) { attend<KvStore::f16>(a); }
GPU_KERNEL(kThreads) halo_attend_int8(AttentionArgs a) { attend<KvStore::int8>(a); }
GPU_KERNEL(kThreads) halo_attend_rotor3(AttentionArgs a) { attend<KvStore::rotor3>(a); }
GPU_KERNEL(kThreads) halo_append_f16(AttentionArgs a) { append<KvStore::f16>(a); }
GPU_KERNEL(kThreads) halo_append_int8(AttentionArgs a) { append<KvStore::int8>(a); }
GPU_KERNEL(kThreads) halo_append_rotor3(AttentionArgs a) { append<KvStore::rotor3>(a); }

inline void launch_attention_kernel(const AttentionArgs &args, KvStore form, Stream &stream) {
  typedef void (*Kernel)(AttentionArgs);
  static const Kernel table[] = {halo_attend_f16, halo_attend_int8, halo_attend_rotor3};
  launch(table[(int)form], {args.blocks, args.kv.kv_heads, args.tokens}, kThreads,
         attention_shared(args.heads / args.kv.kv_heads, args.kv.width), stream, args);
}

inline void launch_append_kernel(const AttentionArgs &args, KvStore form, Stream &stream) {
  typedef void (*Kernel)(AttentionArgs);
  static const Kernel table[] = {halo_append_f16, halo_append_int8, halo_append_rotor3};
  launch(table[(int)form], {args.tokens, args.kv.kv_heads}, kThreads,
         attention_shared(args.heads / args.kv.kv_heads, args.kv.width), stream, args);
}

}  // namespace halo
