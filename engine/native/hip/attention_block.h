// One block of positions of the attention: whose queries a block of threads takes, what it holds, scores, weights and
// weighted sums. Not where the queries come from, nor what becomes of the sums: attention.h. Device code.
#pragma once
#include "kv.h"
#include "launch.h"

namespace halo {

// The query heads of one KV head that a block takes. While there are few blocks of positions, the group's heads are shared
// out among several, each of which reads the same keys and values.
struct Queries {
  int head, first, count;  // KV head; query heads first..first + count of all
};

const int kSharedOutBlocks = 4;  // of positions, up to which heads are shared out

GPU_DEVICE Queries block_queries(const AttentionArgs &a, int index, int parts) {
  const int group = a.heads / a.kv.kv_heads, head = index / parts, part = index % parts;
  const int first = group * part / parts;
  return {head, head * group + first, group * (part + 1) / parts - first};
}

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

const int kFetched = 8;        // chunks of keys that a thread fetches before it knows its queries: heads of 128,
const int kFetchedValues = 4;  // and of values: as many positions, shared by four threads

// What a thread has of the cache in registers, on its way from the start: the key of its position, and the values of its
// element at every other (or every) chunk of positions.
struct Fetched {
  uint4 keys[kFetched], values[kFetchedValues];
  float key_scale, value_scale;  // of the position
};

// Threads that share an element's positions.
GPU_DEVICE int value_parts(int width) { return kWideThreads / width > 1 ? kWideThreads / width : 1; }

template <KvStore kForm>
GPU_DEVICE bool fits_registers(int width) {
  const int parts = value_parts(width);
  return kForm != KvStore::f16 && width / 16 <= kFetched && parts * width <= kWideThreads &&
         (kBlockOfKv / 16 + parts - 1) / parts <= kFetchedValues;
}

// One where a block has to read the new position back from the cache.
template <KvStore kForm>
GPU_DEVICE int query_parts(const AttentionArgs &a, int position) {
  const int group = a.heads / a.kv.kv_heads, most = group < kQueryParts ? group : kQueryParts;
  return fits_registers<kForm>(a.kv.width) && position / kBlockOfKv < kSharedOutBlocks ? most : 1;
}

// `limit` positions of the block, of which the last may not be in the cache yet: its bytes are put in by patch_keys() and
// patch_values().
template <KvStore kForm>
GPU_DEVICE void fetch_keys(Fetched &f, const KvHead &kv, int width, int block, int limit) {
  const int j = thread_id() % kBlockOfKv;
  GPU_UNROLL
  for (int c = 0; c < kFetched; ++c)
    if (j < limit && c < width / 16) f.keys[c] = kv_key_chunk<kForm>(kv, width, block * kBlockOfKv + j, c);
}

template <KvStore kForm>
GPU_DEVICE void fetch_values(Fetched &f, const KvHead &kv, int width, int block, int limit) {
  const int parts = value_parts(width), d = thread_id() % width, part = thread_id() / width;
  GPU_UNROLL
  for (int c = 0; c < kFetchedValues; ++c)
    if (part < parts && 16 * (part + parts * c) < limit)
      f.values[c] = kv_value_chunk<kForm>(kv, width, block * kBlockOfKv + 16 * (part + parts * c), d);
}

// Byte i of 16, as a mask or as a value.
GPU_DEVICE uint4 byte_of_four(int i, uint32_t byte) {
  const uint32_t value = byte << 8 * (i % 4);
  return make_uint4(i / 4 == 0 ? value : 0, i / 4 == 1 ? value : 0, i / 4 == 2 ? value : 0, i / 4 == 3 ? value : 0);
}

// The new position (the block's number `last`) into what was fetched before it was written.
GPU_DEVICE void patch_keys(Fetched &f, const AttentionRoom &r, int width, int last) {
  if (thread_id() % kBlockOfKv != last) return;
  GPU_UNROLL
  for (int c = 0; c < kFetched; ++c)
    if (c < width / 16) f.keys[c] = ((const uint4 *)r.codes)[c];
}

GPU_DEVICE void patch_values(Fetched &f, const AttentionRoom &r, int width, int last) {
  const int parts = value_parts(width), d = thread_id() % width, part = thread_id() / width;
  const uint4 mask = byte_of_four(last % 16, 255), value = byte_of_four(last % 16, r.codes[width + d]);
  GPU_UNROLL
  for (int c = 0; c < kFetchedValues; ++c)
    if (part < parts && part + parts * c == last / 16)
      f.values[c] = make_uint4((f.values[c].x & ~mask.x) | value.x, (f.values[c].y & ~mask.y) | value.y,
                               (f.values[c].z & ~mask.z) | value.z, (f.values[c].w & ~mask.w) | value.w);
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

GPU_DEVICE int key_dot(int sum, const uint4 &k, const int8_t *q8) {
  const uint4 q = *(const uint4 *)q8;
  return dot4_ss(k.x, q.x, dot4_ss(k.y, q.y, dot4_ss(k.z, q.z, dot4_ss(k.w, q.w, sum))));
}

// The halves of the block share the heads.
template <KvStore kForm>
GPU_DEVICE void whole_scores(const AttentionRoom &r, const KvHead &kv, const Fetched &f, bool fetched, int width, int block,
                             int limit, int group) {
  const int j = thread_id() % kBlockOfKv;
  if (j >= limit) return;
  const float scale = r.key_scales[j];
  GPU_NO_UNROLL
  for (int g = thread_id() / kBlockOfKv; g < group; g += kWideThreads / kBlockOfKv) {
    const int8_t *q8 = r.q8 + g * width;
    int sum = 0;
    if (fetched) {
      GPU_UNROLL
      for (int c = 0; c < kFetched; ++c)
        if (c < width / 16) sum = key_dot(sum, f.keys[c], q8 + 16 * c);
    } else {
      GPU_NO_UNROLL
      for (int c = 0; c < width / 16; ++c)
        sum = key_dot(sum, kv_key_chunk<kForm>(kv, width, block * kBlockOfKv + j, c), q8 + 16 * c);
    }
    r.scores[g * kBlockOfKv + j] = (float)sum * scale * r.q_scales[g];
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

GPU_DEVICE int value_dot(const uint8_t *weights, int chunk, const uint4 &v) {
  const uint4 w = ((const uint4 *)weights)[chunk];
  return dot4_us(w.x, v.x, dot4_us(w.y, v.y, dot4_us(w.z, v.z, dot4_us(w.w, v.w, 0))));
}

// Of what was fetched: a head after the other, so that there is one copy of the code.
GPU_DEVICE void add_fetched_values(const AttentionRoom &r, const Fetched &f, int width, int limit, int group) {
  const int chunks = (limit + 15) / 16, parts = value_parts(width), d = thread_id() % width, part = thread_id() / width;
  if (part >= parts) return;
  GPU_NO_UNROLL
  for (int g = 0; g < group; ++g) {
    int high = 0, low = 0;
    GPU_UNROLL
    for (int c = 0; c < kFetchedValues; ++c)
      if (part + parts * c < chunks) {
        high += value_dot(r.high + g * kBlockOfKv, part + parts * c, f.values[c]);
        low += value_dot(r.low + g * kBlockOfKv, part + parts * c, f.values[c]);
      }
    atomic_add(r.sums + g * width + d, 256 * high + low);
  }
}

template <KvStore kForm>
GPU_DEVICE void add_values(const AttentionRoom &r, const KvHead &kv, int width, int block, int limit, int group) {
  const int chunks = (limit + 15) / 16, parts = value_parts(width);
  for (int i = thread_id(); i < parts * width; i += kWideThreads) {
    const int d = i % width, part = i / width;
    for (int first = 0; first < group; first += 4) {
      const int some = group - first < 4 ? group - first : 4;
      int high[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0};
      GPU_NO_UNROLL
      for (int c = part; c < chunks; c += parts)
        add_value_chunk(high, low, kv_value_chunk<kForm>(kv, width, block * kBlockOfKv + 16 * c, d), r, first, some, c);
      GPU_UNROLL
      for (int g = 0; g < 4; ++g)
        if (g < some) atomic_add(r.sums + (first + g) * width + d, 256 * high[g] + low[g]);
    }
  }
}

// Threads share the positions as well as the elements: whole numbers may be added in any order.
template <KvStore kForm>
GPU_DEVICE void whole_values(const AttentionRoom &r, const KvHead &kv, const Fetched &f, bool fetched, int width, int block,
                             int limit, int group, float *out, int out_row) {
  if (fetched) {
    add_fetched_values(r, f, width, limit, group);
  } else {
    add_values<kForm>(r, kv, width, block, limit, group);
  }
  sync_block();
  for (int i = thread_id(); i < group * width; i += kWideThreads) {
    const int g = i / width, d = i % width;
    out[g * out_row + d] = (float)r.sums[i] * r.units[g];
  }
  sync_block();
}

}  // namespace halo
