// Attention over the KV cache for the tokens of a decode step: split over blocks of 256 positions, put together by
// whichever block of threads comes last. The arithmetic is that of cpu/attention.inc.h and engine/kv_forms.py, to the
// last bit. Device code.
#pragma once
#include "attention_block.h"

namespace halo {

// Sums of all blocks to the row of the output: divided by the total, turned back where the form turned them.
template <KvStore kForm>
GPU_DEVICE void finish_heads(const AttentionArgs &a, const AttentionRoom &r, float *sums, int sums_row, int token,
                             const Queries &own) {
  const int width = a.kv.width, size = a.kv.head_dim, group = own.count;
  float *out = a.out + (size_t)token * a.out_stride + own.first * size;
  if (kForm != KvStore::rotor3) {
    for (int i = thread_id(); i < group * size; i += kWideThreads)
      out[i] = sums[i / size * sums_row + i % size] / r.totals[i / size];
    return;
  }
  for (int i = thread_id(); i < group * width; i += kWideThreads)
    r.raw[i] = sums[i / width * sums_row + i % width] / r.totals[i / width];
  sync_block();
  turn_back(r.raw, group, width);
  const float shorter = 1.0f / (float)size;
  for (int i = thread_id(); i < group * size; i += kWideThreads) out[i] = r.raw[i / size * width + i % size] * shorter;
}

// Merge what the blocks of one (token, KV head) have left, in rising order.
template <KvStore kForm>
GPU_DEVICE void merge_blocks(const AttentionArgs &a, const AttentionRoom &r, const float *partial, size_t block_row,
                             int blocks, int token, const Queries &own_heads) {
  const int width = a.kv.width, row = width + 2, group = own_heads.count;
  // Each thread has the same elements throughout: d of a head, or its total (element width).
  for (int i = thread_id(); i < group * (width + 1); i += kWideThreads) {
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
  finish_heads<kForm>(a, r, r.scores, width, token, own_heads);
}

// The new token's key and value into the cache, its queries as the form wants them, the block's scales.
template <KvStore kForm>
GPU_DEVICE void prepare(const AttentionArgs &a, const AttentionRoom &r, const KvHead &kv, const Fetched &f, int token,
                        const Queries &own, int limit, bool writes) {
  const int width = a.kv.width, size = a.kv.head_dim, position = a.positions[token], group = own.count;
  const bool stores = own.first % (a.heads / a.kv.kv_heads) == 0;  // one of the blocks that see the new position
  take_vectors(a, token, own.head, own.first, group, writes, r.raw);
  for (int i = thread_id(); i < group * width; i += kWideThreads) r.sums[i] = 0;
  if (kForm != KvStore::f16 && thread_id() < limit - writes) {
    r.key_scales[thread_id()] = f.key_scale;
    r.value_scales[thread_id()] = f.value_scale;
  }
  sync_block();
  if (kForm == KvStore::f16) {
    if (writes) put_halves(kv, r.raw + group * width, width, position);
    for (int i = thread_id(); i < group * width; i += kWideThreads) r.raw[i] = r.raw[i] * a.scale;
    sync_block();
    return;
  }
  if (kForm == KvStore::rotor3) turn(r.raw, group + (writes ? 2 : 0), width);
  for (int v = wave_id(); v < group + (writes ? 2 : 0); v += kWideThreads / kWave) {
    const float *x = r.raw + v * width;
    if (v < group) {
      const float scale = quantize_query<kForm>(x, width, size, a.scale, r.q8 + v * width);
      if (lane_id() == 0) r.q_scales[v] = scale;
    } else {
      const int which = v - group;
      const float scale = put_vector<kForm>(kv, which, x, width, position, r.codes + which * width, stores);
      if (lane_id() == 0) (which == 0 ? r.key_scales : r.value_scales)[limit - 1] = scale;
    }
  }
  sync_block();
}

// One block of positions, for some query heads of one KV head of one token.
template <KvStore kForm>
GPU_DEVICE void attend_block(const AttentionArgs &a, int block, const Queries &own, int token) {
  const int position = a.positions[token], slot = a.slots[token];
  const int blocks = position / kBlockOfKv + 1;
  const int group = own.count, width = a.kv.width, all = a.heads / a.kv.kv_heads;
  const int limit = block + 1 < blocks ? kBlockOfKv : position % kBlockOfKv + 1;
  const bool writes = a.append && block + 1 == blocks, fetched = fits_registers<kForm>(width);
  const AttentionRoom r = attention_room(shared_memory(), all, width);
  const KvHead kv = kv_head(a.kv, slot, a.layer, own.head, kForm);
  Fetched f;
  if (fetched) {
    fetch_keys<kForm>(f, kv, width, block, limit);
    fetch_values<kForm>(f, kv, width, block, limit);
  }
  if (kForm != KvStore::f16 && thread_id() < limit - writes) {
    const int at = block * kBlockOfKv + thread_id();
    f.key_scale = kv.key_scales[at];
    f.value_scale = kv.value_scales[at];
  }
  prepare<kForm>(a, r, kv, f, token, own, limit, writes);
  if (fetched && writes) patch_keys(f, r, width, limit - 1);
  if (kForm == KvStore::f16) {
    float_scores(a, r, kv, block, limit, group);
  } else {
    whole_scores<kForm>(r, kv, f, fetched, width, block, limit, group);
  }
  sync_block();
  if (fetched && writes) patch_values(f, r, width, limit - 1);
  block_weights<kForm>(r, limit, group);
  sync_block();
  const size_t row = width + 2, block_row = (size_t)all * row;
  float *partial = a.partial + ((size_t)token * a.kv.kv_heads + own.head) * a.blocks * block_row + own.first % all * row;
  // The only block's sums stay where they are, each thread turning its own.
  float *to = blocks == 1 ? (float *)r.sums : partial + block * block_row;
  const int to_row = blocks == 1 ? width : (int)row;
  if (kForm == KvStore::f16) {
    float_values(r, kv, width, block, limit, group, to, to_row);
  } else {
    whole_values<kForm>(r, kv, f, fetched, width, block, limit, group, to, to_row);
  }
  if (blocks == 1) {
    finish_heads<kForm>(a, r, (float *)r.sums, width, token, own);
    return;
  }
  for (int g = thread_id(); g < group; g += kWideThreads) {
    partial[block * block_row + g * row + width] = r.tops[g];
    partial[block * block_row + g * row + width + 1] = r.totals[g];
  }
  fence();
  sync_block();
  int32_t *count = a.counts + token * a.heads + own.first;
  if (thread_id() == 0) r.scratch[0] = (uint32_t)atomic_add(count, 1);
  sync_block();
  if ((int)r.scratch[0] + 1 < blocks) return;
  fence();
  if (thread_id() == 0) *count = 0;
  merge_blocks<kForm>(a, r, partial, block_row, blocks, token, own);
}

// Grid: blocks of positions, KV heads times the most parts of a group, tokens.
template <KvStore kForm>
GPU_DEVICE void attend(const AttentionArgs &a) {
  let_next_start();
  wait_for_previous();
  const int token = block_z(), position = a.positions[token], parts = query_parts<kForm>(a, position);
  if (block_id() <= position / kBlockOfKv && block_y() < a.kv.kv_heads * parts)
    attend_block<kForm>(a, block_id(), block_queries(a, block_y(), parts), token);
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

GPU_KERNEL(kWideThreads) halo_attend_f16(AttentionArgs a) { attend<KvStore::f16>(a); }
GPU_KERNEL(kWideThreads) halo_attend_int8(AttentionArgs a) { attend<KvStore::int8>(a); }
GPU_KERNEL(kWideThreads) halo_attend_rotor3(AttentionArgs a) { attend<KvStore::rotor3>(a); }
GPU_KERNEL(kWideThreads) halo_append_f16(AttentionArgs a) { append<KvStore::f16>(a); }
GPU_KERNEL(kWideThreads) halo_append_int8(AttentionArgs a) { append<KvStore::int8>(a); }
GPU_KERNEL(kWideThreads) halo_append_rotor3(AttentionArgs a) { append<KvStore::rotor3>(a); }

inline void launch_attention_kernel(const AttentionArgs &args, KvStore form, Stream &stream) {
  typedef void (*Kernel)(AttentionArgs);
  static const Kernel table[] = {halo_attend_f16, halo_attend_int8, halo_attend_rotor3};
  const int group = args.heads / args.kv.kv_heads, parts = group < kQueryParts ? group : kQueryParts;
  launch(table[(int)form], {args.blocks, args.kv.kv_heads * parts, args.tokens}, kWideThreads,
         attention_shared(args.heads / args.kv.kv_heads, args.kv.width), stream, args);
}

inline void launch_append_kernel(const AttentionArgs &args, KvStore form, Stream &stream) {
  typedef void (*Kernel)(AttentionArgs);
  static const Kernel table[] = {halo_append_f16, halo_append_int8, halo_append_rotor3};
  launch(table[(int)form], {args.tokens, args.kv.kv_heads}, kWideThreads,
         attention_shared(args.heads / args.kv.kv_heads, args.kv.width), stream, args);
}

}  // namespace halo
