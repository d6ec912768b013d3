// Attention over the KV cache for the tokens of a decode step: split over blocks of 256 positions, put together by
// whichever block of threads comes last. The arithmetic is that of cpu/attention.inc.h and engine/kv_forms.py, to the
// last bit. Device code.
#pragma once
#include "kv.h"
#include "launch.h"

namespace halo {

// What one block of threads holds in shared memory. Queries as the form wants them: int8 [group][width] or float.
struct AttentionRoom {
  uint32_t *scratch;
  float *raw;       // [group + 2][width]: queries, the new key, the new value, as floats
  float *scores;    // [group][256]
  int *sums;        // [group][width]
  float *q_scales;  // [group]
  float *tops, *totals, *units;  // [group]
  float *new_scales;             // of the new key and value
  float *key_scales, *value_scales;  // [256]
  int8_t *q8;                    // [group][width]
  uint8_t *high, *low;           // [group][256]: bytes of the weights
  uint8_t *codes;                // [2][width]: the new key's and value's
};

// Floats, then bytes.
inline size_t attention_shared(int group, int width) {
  return 256 + (size_t)4 * ((group + 2) * width + group * kBlockOfKv + group * width + 4 * kMostGroup + 4 + 2 * kBlockOfKv) +
         (size_t)group * width + 2 * group * kBlockOfKv + 2 * width;
}

GPU_DEVICE AttentionRoom attention_room(uint8_t *shared, int group, int width) {
  AttentionRoom r;
  r.scratch = (uint32_t *)shared;
  r.raw = (float *)(shared + 256);
  r.scores = r.raw + (group + 2) * width;
  r.sums = (int *)(r.scores + group * kBlockOfKv);
  r.q_scales = (float *)(r.sums + group * width);
  r.tops = r.q_scales + kMostGroup;
  r.totals = r.tops + kMostGroup;
  r.units = r.totals + kMostGroup;
  r.new_scales = r.units + kMostGroup;
  r.key_scales = r.new_scales + 4;
  r.value_scales = r.key_scales + kBlockOfKv;
  r.q8 = (int8_t *)(r.value_scales + kBlockOfKv);
  r.high = (uint8_t *)r.q8 + group * width;
  r.low = r.high + group * kBlockOfKv;
  r.codes = r.low + group * kBlockOfKv;
  return r;
}

const int kFetched = 8;  // chunks of keys, and of values, that a thread fetches before it knows its queries

// What a thread has of the cache in registers, on its way from the start: the key of its position, and the values of its
// element at every other (or every) chunk of positions.
struct Fetched {
  uint4 keys[kFetched], values[kFetched];
  float key_scale, value_scale;  // of the position
};

// Threads that share an element's positions.
GPU_DEVICE int value_parts(int width) { return kWideThreads / width > 1 ? kWideThreads / width : 1; }

template <KvStore kForm>
GPU_DEVICE bool fits_registers(int width) {
  const int parts = value_parts(width);
  return kForm != KvStore::f16 && width / 16 <= kFetched && parts * width <= kWideThreads &&
         (kBlockOfKv / 16 + parts - 1) / parts <= kFetched;
}

// `limit` positions of the block, of which the last may not be in the cache yet: its bytes are put in by patch().
template <KvStore kForm>
GPU_DEVICE void fetch(Fetched &f, const KvHead &kv, int width, int block, int limit) {
  const int j = thread_id() % kBlockOfKv, parts = value_parts(width), d = thread_id() % width, part = thread_id() / width;
  GPU_UNROLL
  for (int c = 0; c < kFetched; ++c)
    if (j < limit && c < width / 16) f.keys[c] = kv_key_chunk<kForm>(kv, width, block * kBlockOfKv + j, c);
  GPU_UNROLL
  for (int c = 0; c < kFetched; ++c)
    if (part < parts && 16 * (part + parts * c) < limit)
      f.values[c] = kv_value_chunk<kForm>(kv, width, block * kBlockOfKv + 16 * (part + parts * c), d);
}

GPU_DEVICE void set_byte(uint4 &w, int i, uint32_t byte) {
  const uint32_t mask = 0xffu << 8 * (i % 4), value = byte << 8 * (i % 4);
  if (i / 4 == 0) w.x = (w.x & ~mask) | value;
  if (i / 4 == 1) w.y = (w.y & ~mask) | value;
  if (i / 4 == 2) w.z = (w.z & ~mask) | value;
  if (i / 4 == 3) w.w = (w.w & ~mask) | value;
}

// The new position (the block's number `last`) into what was fetched before it was written.
GPU_DEVICE void patch(Fetched &f, const AttentionRoom &r, int width, int last) {
  const int j = thread_id() % kBlockOfKv, parts = value_parts(width), d = thread_id() % width, part = thread_id() / width;
  if (j == last)
    GPU_UNROLL
    for (int c = 0; c < kFetched; ++c)
      if (c < width / 16) f.keys[c] = ((const uint4 *)r.codes)[c];
  GPU_UNROLL
  for (int c = 0; c < kFetched; ++c)
    if (part < parts && part + parts * c == last / 16) set_byte(f.values[c], last % 16, r.codes[width + d]);
}

// Scores of this block's positions: a thread a position, all query heads of the group, four at a time.
GPU_DEVICE void float_scores(const AttentionArgs &a, const AttentionRoom &r, const KvHead &kv, int block, int limit, int group) {
  const int width = a.kv.width;
  for (int j = thread_id(); j < limit; j += kWideThreads)
    for (int first = 0; first < group; first += 4) {
      const int some = group - first < 4 ? group - first : 4;
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int d = 0; d < width; d += 8) {
        uint4 eight = kv_key_chunk<KvStore::f16>(kv, width, block * kBlockOfKv + j, d / 8);
        GPU_UNROLL
        for (int e = 0; e < 8; ++e) {
          float k = half_of(word_at(eight, e / 2) >> 16 * (e % 2));
          if (d + e < a.kv.head_dim)
            GPU_UNROLL
            for (int g = 0; g < 4; ++g)
              if (g < some) sum[g] = fused(r.raw[(first + g) * width + d + e], k, sum[g]);
        }
      }
      GPU_UNROLL
      for (int g = 0; g < 4; ++g)
        if (g < some) r.scores[(first + g) * kBlockOfKv + j] = sum[g];
    }
}

GPU_DEVICE void add_key_chunk(int (&sum)[2], const uint4 &k, const int8_t *q8, int width, int some) {
  GPU_UNROLL
  for (int g = 0; g < 2; ++g) {
    if (g < some) {
      uint4 q = *(const uint4 *)(q8 + g * width);
      sum[g] = dot4_ss(k.x, q.x, dot4_ss(k.y, q.y, sum[g]));
      sum[g] = dot4_ss(k.z, q.z, dot4_ss(k.w, q.w, sum[g]));
    }
  }
}

// The halves of the block share the heads, two at a time.
template <KvStore kForm>
GPU_DEVICE void whole_scores(const AttentionRoom &r, const KvHead &kv, const Fetched &f, bool fetched, int width, int block,
                             int limit, int group) {
  const int j = thread_id() % kBlockOfKv;
  if (j >= limit) return;
  for (int first = thread_id() / kBlockOfKv * 2; first < group; first += kWideThreads / kBlockOfKv * 2) {
    const int some = group - first < 2 ? group - first : 2;
    const int8_t *q8 = r.q8 + first * width;
    int sum[2] = {0, 0};
    if (fetched) {
      GPU_UNROLL
      for (int c = 0; c < kFetched; ++c)
        if (c < width / 16) add_key_chunk(sum, f.keys[c], q8 + 16 * c, width, some);
    } else {
      for (int c = 0; c < width / 16; ++c)
        add_key_chunk(sum, kv_key_chunk<kForm>(kv, width, block * kBlockOfKv + j, c), q8 + 16 * c, width, some);
    }
    const float scale = r.key_scales[j];
    GPU_UNROLL
    for (int g = 0; g < 2; ++g)
      if (g < some) r.scores[(first + g) * kBlockOfKv + j] = (float)sum[g] * scale * r.q_scales[first + g];
  }
}

GPU_DEVICE float wave_most(float x) {
  for (int half = 16; half; half /= 2) {
    const float other = shuffle_xor(x, half);
    x = other > x ? other : x;
  }
  return x;
}

// Scores to weights, a wave a head: their largest score, their sum in 16 lanes, and of the integer forms the bytes of the
// weights in 15 bits of their largest. Lane l has positions l, l + 32, ...: number 2 k of a sum's lane l, and of lane l - 16
// number 2 k + 1.
template <KvStore kForm>
GPU_DEVICE void block_weights(const AttentionRoom &r, int limit, int group) {
  const int lane = lane_id(), kOwn = kBlockOfKv / kWave;
  for (int g = wave_id(); g < group; g += kWideThreads / kWave) {
    float *scores = r.scores + g * kBlockOfKv;
    float own[kOwn], top = scores[0];
    GPU_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      own[k] = lane + kWave * k < limit ? scores[lane + kWave * k] : top;
      top = own[k] > top ? own[k] : top;
    }
    top = wave_most(top);
    float sum = 0.0f;
    GPU_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      own[k] = lane + kWave * k < limit ? exp_of(own[k] - top) : 0.0f;
      const float other = shuffle_xor(own[k], 16);
      sum = sum + (lane < 16 ? own[k] : other);
      sum = sum + (lane < 16 ? other : own[k]);
    }
    sum = add_lanes(sum);
    if (lane == 0) r.tops[g] = top, r.totals[g] = sum;
    if (kForm == KvStore::f16) {
      GPU_UNROLL
      for (int k = 0; k < kOwn; ++k) scores[lane + kWave * k] = own[k];
      continue;
    }
    float most = 1e-30f;
    GPU_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      own[k] = lane + kWave * k < limit ? own[k] * r.value_scales[lane + kWave * k] : 0.0f;
      most = own[k] > most ? own[k] : most;
    }
    most = wave_most(most);
    const float factor = 32767.0f / most;
    GPU_UNROLL
    for (int k = 0; k < kOwn; ++k) {
      const int w = (int)nearest(own[k] * factor), j = g * kBlockOfKv + lane + kWave * k;
      r.high[j] = (uint8_t)(w >> 8);
      r.low[j] = (uint8_t)w;
    }
    if (lane == 0) r.units[g] = most / 32767.0f;
  }
}

// Sums of weight * value to `out` [group][out_row]: floats.
GPU_DEVICE void float_values(const AttentionRoom &r, const KvHead &kv, int width, int block, int limit, int group, float *out,
                             int out_row) {
  for (int i = thread_id(); i < group * width; i += kWideThreads) {
    const int g = i / width, d = i % width;
    float sum = 0.0f;
    for (int j = 0; j < limit; j += 8) {
      uint4 eight = kv_value_chunk<KvStore::f16>(kv, width, block * kBlockOfKv + j, d);
      GPU_UNROLL
      for (int e = 0; e < 8; ++e)
        if (j + e < limit)
          sum = fused(r.scores[g * kBlockOfKv + j + e], half_of(word_at(eight, e / 2) >> 16 * (e % 2)), sum);
    }
    out[g * out_row + d] = sum;
  }
  sync_block();
}

GPU_DEVICE void add_value_chunk(int (&high)[4], int (&low)[4], const uint4 &v, const AttentionRoom &r, int first, int some,
                                int chunk) {
  GPU_UNROLL
  for (int g = 0; g < 4; ++g) {
    if (g < some) {
      uint4 h = ((const uint4 *)(r.high + (first + g) * kBlockOfKv))[chunk];
      uint4 l = ((const uint4 *)(r.low + (first + g) * kBlockOfKv))[chunk];
      high[g] = dot4_us(h.x, v.x, dot4_us(h.y, v.y, dot4_us(h.z, v.z, dot4_us(h.w, v.w, high[g]))));
      low[g] = dot4_us(l.x, v.x, dot4_us(l.y, v.y, dot4_us(l.z, v.z, dot4_us(l.w, v.w, low[g]))));
    }
  }
}

// Threads share the positions as well as the elements: whole numbers may be added in any order.
template <KvStore kForm>
GPU_DEVICE void whole_values(const AttentionRoom &r, const KvHead &kv, const Fetched &f, bool fetched, int width, int block,
                             int limit, int group, float *out, int out_row) {
  const int chunks = (limit + 15) / 16, parts = value_parts(width);
  for (int i = thread_id(); i < parts * width; i += kWideThreads) {
    const int d = i % width, part = i / width;
    for (int first = 0; first < group; first += 4) {
      const int some = group - first < 4 ? group - first : 4;
      int high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
      if (fetched) {
        GPU_UNROLL
        for (int c = 0; c < kFetched; ++c)
          if (part + parts * c < chunks) add_value_chunk(high, low, f.values[c], r, first, some, part + parts * c);
      } else {
        for (int c = part; c < chunks; c += parts)
          add_value_chunk(high, low, kv_value_chunk<kForm>(kv, width, block * kBlockOfKv + 16 * c, d), r, first, some, c);
      }
      GPU_UNROLL
      for (int g = 0; g < 4; ++g)
        if (g < some) atomic_add(r.sums + (first + g) * width + d, 256 * high[g] + low[g]);
    }
  }
  sync_block();
  for (int i = thread_id(); i < group * width; i += kWideThreads) {
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
  float *out = a.out + (size_t)token * a.out_stride + head * group * size;
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
                             int blocks, int token, int head, int group) {
  const int width = a.kv.width, row = width + 2;
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
  finish_heads<kForm>(a, r, r.scores, width, token, head, group);
}

// The new token's key and value into the cache, its queries as the form wants them, the block's scales.
template <KvStore kForm>
GPU_DEVICE void prepare(const AttentionArgs &a, const AttentionRoom &r, const KvHead &kv, const Fetched &f, int token, int head,
                        int group, int limit, bool writes) {
  const int width = a.kv.width, size = a.kv.head_dim, position = a.positions[token];
  take_vectors(a, token, head, group, writes, r.raw);
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
      const float scale = put_vector<kForm>(kv, which, x, width, position, r.codes + which * width);
      if (lane_id() == 0) (which == 0 ? r.key_scales : r.value_scales)[limit - 1] = scale;
    }
  }
  sync_block();
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
  const bool writes = a.append && block + 1 == blocks, fetched = fits_registers<kForm>(width);
  const AttentionRoom r = attention_room(shared_memory(), group, width);
  const KvHead kv = kv_head(a.kv, slot, a.layer, head, kForm);
  Fetched f;
  if (fetched) fetch<kForm>(f, kv, width, block, limit);
  if (kForm != KvStore::f16 && thread_id() < limit - writes) {
    const int at = block * kBlockOfKv + thread_id();
    f.key_scale = kv.key_scales[at];
    f.value_scale = kv.value_scales[at];
  }
  prepare<kForm>(a, r, kv, f, token, head, group, limit, writes);
  if (fetched && writes) patch(f, r, width, limit - 1);
  if (kForm == KvStore::f16) {
    float_scores(a, r, kv, block, limit, group);
  } else {
    whole_scores<kForm>(r, kv, f, fetched, width, block, limit, group);
  }
  sync_block();
  block_weights<kForm>(r, limit, group);
  sync_block();
  const size_t row = width + 2, block_row = (size_t)group * row;
  float *partial = a.partial + ((size_t)token * a.kv.kv_heads + head) * a.blocks * block_row;
  // The only block's sums stay where they are, each thread turning its own.
  float *to = blocks == 1 ? (float *)r.sums : partial + block * block_row;
  const int to_row = blocks == 1 ? width : (int)row;
  if (kForm == KvStore::f16) {
    float_values(r, kv, width, block, limit, group, to, to_row);
  } else {
    whole_values<kForm>(r, kv, f, fetched, width, block, limit, group, to, to_row);
  }
  if (blocks == 1) {
    finish_heads<kForm>(a, r, (float *)r.sums, width, token, head, group);
    return;
  }
  for (int g = thread_id(); g < group; g += kWideThreads) {
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

GPU_KERNEL(kWideThreads) halo_attend_f16(AttentionArgs a) { attend<KvStore::f16>(a); }
GPU_KERNEL(kWideThreads) halo_attend_int8(AttentionArgs a) { attend<KvStore::int8>(a); }
GPU_KERNEL(kWideThreads) halo_attend_rotor3(AttentionArgs a) { attend<KvStore::rotor3>(a); }
GPU_KERNEL(kWideThreads) halo_append_f16(AttentionArgs a) { append<KvStore::f16>(a); }
GPU_KERNEL(kWideThreads) halo_append_int8(AttentionArgs a) { append<KvStore::int8>(a); }
GPU_KERNEL(kWideThreads) halo_append_rotor3(AttentionArgs a) { append<KvStore::rotor3>(a); }

inline void launch_attention_kernel(const AttentionArgs &args, KvStore form, Stream &stream) {
  typedef void (*Kernel)(AttentionArgs);
  static const Kernel table[] = {halo_attend_f16, halo_attend_int8, halo_attend_rotor3};
  launch(table[(int)form], {args.blocks, args.kv.kv_heads, args.tokens}, kWideThreads,
         attention_shared(args.heads / args.kv.kv_heads, args.kv.width), stream, args);
}

inline void launch_append_kernel(const AttentionArgs &args, KvStore form, Stream &stream) {
  typedef void (*Kernel)(AttentionArgs);
  static const Kernel table[] = {halo_append_f16, halo_append_int8, halo_append_rotor3};
  launch(table[(int)form], {args.tokens, args.kv.kv_heads}, kWideThreads,
         attention_shared(args.heads / args.kv.kv_heads, args.kv.width), stream, args);
}

}  // namespace halo
