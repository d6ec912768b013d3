// What the attention of many tokens (prefill_attention.h) has in shared memory: its queries, prepared, and the keys and
// values on their way. Not the arithmetic on them. Device code.
#pragma once
#include "kv.h"
#include "mma.h"
#include "prefill_launch.h"

namespace halo {
namespace prefill {

const int kAttendThreads = 128, kAttendWaves = kAttendThreads / kWave;
const int kValueElements = 32;                               // of a stage of values
const int kStageBytes = kBlockOfKv * kValueElements;         // of a stage
const int kCopies = kStageBytes / 16 / kAttendThreads;       // that each thread makes of it
const int kScaleBytes = 4 * 2 * kBlockOfKv;  // of the keys and values of one block


// What a block of threads works on.
struct Work {
  PrefillTile tile;
  KvHead kv;
  int head, group, rows;  // rows: queries
  int last, seen;         // block of positions that the tile lies in, and how many of it its last token sees
  uint8_t *queries;       // [wave][width / 16][16][16 bytes]
  float *q_scales;        // [kPrefillRows]
  uint8_t *scales;        // [2][keys, values][256]
  uint8_t *stages;
};

GPU_DEVICE Work work_of(const PrefillAttentionArgs &a, KvStore form) {
  Work w;
  w.tile = a.tiles[block_id()];
  w.head = block_y();
  w.kv = kv_head(a.base.kv, w.tile.slot, a.base.layer, w.head, form);
  w.group = a.base.heads / a.base.kv.kv_heads;
  w.rows = w.tile.count * w.group;
  w.last = w.tile.position / kBlockOfKv;
  w.seen = w.tile.position % kBlockOfKv + w.tile.count;
  w.q_scales = (float *)shared_memory();
  w.scales = shared_memory() + 4 * kPrefillRows;
  w.queries = w.scales + 2 * kScaleBytes;
  w.stages = w.queries + a.query_bytes;
  return w;
}

// H x for four vectors of a wave in shared memory; the block meets.
GPU_DEVICE void hadamard_rows(float *x, int width) {
  for (int half = 1; half < width; half *= 2) {
    for (int i = lane_id(); i < 2 * width; i += kWave) {
      const int in = i % (width / 2), low = i / (width / 2) * width + in / half * 2 * half + in % half;
      const float a = x[low], b = x[low + half];
      x[low] = a + b;
      x[low + half] = a - b;
    }
    sync_block();
  }
}

// Four queries of the wave through RoPE into shared memory, filled up with zeros.
GPU_DEVICE void take_queries(const AttentionArgs &a, const Work &w, int first, float *to) {
  const int width = a.kv.width, size = a.kv.head_dim, half = size / 2;
  for (int i = lane_id(); i < width - half; i += kWave) {
    GPU_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = first + r, token = row / w.group;
      float *out = to + r * width;
      if (i >= half || row >= w.rows) {
        out[i + half] = 0.0f;
        if (i < half) out[i] = 0.0f;
        continue;
      }
      const float *in = a.qkv + (size_t)(w.tile.first + token) * a.qkv_stride + (w.head * w.group + row % w.group) * size;
      const size_t at = (size_t)(w.tile.position + token) * a.rope_row + i;
      const float x = taken(in[i], a.status), y = taken(in[i + half], a.status);
      const float cosine = a.rope_cos[at], sine = a.rope_sin[at];
      out[i] = x * cosine - y * sine;
      out[i + half] = y * cosine + x * sine;
    }
  }
}

// The wave's 16 queries to int8, in the matrix unit's order. cpu/attention.cpp, put_query.
template <KvStore kForm>
GPU_DEVICE void prepare_rows(const AttentionArgs &a, const Work &w, int units) {
  const int width = a.kv.width, lane = lane_id();
  const float scale = kForm == KvStore::rotor3 ? a.scale / (float)a.kv.head_dim : a.scale;
  float *four = (float *)w.stages + mma::own_wave() * 4 * width;
  uint8_t *own = w.queries + mma::own_wave() * units * 256;
  for (int batch = 0; batch < 16; batch += 4) {
    take_queries(a, w, mma::own_wave() * 16 + batch, four);
    sync_block();
    if (kForm == KvStore::rotor3) {
      for (int i = lane; i < 4 * width; i += kWave) four[i] = four[i] * rotation_sign(i % width);
      sync_block();
      hadamard_rows(four, width);
    }
    for (int r = 0; r < 4; ++r) {
      float most = wave_largest(four + r * width, width);
      most = most > 1e-30f ? most : 1e-30f;
      const float factor = 127.0f / most;
      if (lane == 0) w.q_scales[mma::own_wave() * 16 + batch + r] = most / 127.0f * scale;
      for (int i = lane; i < 16 * units; i += kWave)
        own[i / 16 * 256 + (batch + r) * 16 + i % 16] =
            i < width ? (uint8_t)(int8_t)nearest(four[r * width + i] * factor) : 0;
    }
    sync_block();
  }
}

// Keys and values on their way into shared memory: keys of 64 positions after one another, then values of 32 elements.
#if defined(HALO_MMA_SYNC)
template <KvStore kForm>
struct Way {
  static const bool kAsync = kForm == KvStore::int8;
  static const int kStages = kAsync ? 3 : 2;
};
#else
template <KvStore kForm>
struct Way {
  static const bool kAsync = false;
  static const int kStages = 2;
};
#endif

template <KvStore kForm>
struct Feed {
  int block = 0, chunk = 0, fetched = 0, used = 0;  // the next to fetch; stages so far
  uint4 units[kForm == KvStore::int8 && !Way<kForm>::kAsync ? kCopies : 1];
  uint32_t low[kForm == KvStore::rotor3 ? kCopies : 1], high[kForm == KvStore::rotor3 ? kCopies : 1];
  int into = -1;  // the stage that what is in registers belongs to
};

GPU_DEVICE int positions_of(const Work &w, int block) { return block < w.last ? kBlockOfKv : w.seen; }

// One unit of 16 bytes. It may be read in any case; `wanted` says if it must be.
template <KvStore kForm>
GPU_DEVICE void fetch_unit(Feed<kForm> &f, const uint8_t *base, size_t words, size_t unit, uint8_t *to,
                           bool wanted, int i) {
  if (kForm == KvStore::rotor3) {
    f.low[i] = ((const uint32_t *)base)[unit];
    f.high[i] = ((const uint16_t *)(base + words))[unit];
  } else {
#if defined(HALO_MMA_SYNC)
    if (wanted) mma::copy16(to, base + 16 * unit);
#else
    (void)to, (void)wanted;  // land() puts it there
    f.units[i] = ((const uint4 *)base)[unit];
#endif
  }
}

template <KvStore kForm>
GPU_DEVICE void fetch_scales(const Work &w, int block) {
  const int thread = mma::fresh(thread_id()), at = block * kBlockOfKv + thread % 64 * 4;
  const float *from = (thread < 64 ? w.kv.key_scales : w.kv.value_scales) + at;
  uint8_t *to = w.scales + block % 2 * kScaleBytes + thread * 16;
#if defined(HALO_MMA_SYNC)
  if (Way<kForm>::kAsync) {
    mma::copy16(to, from);
    return;
  }
#endif
  *(uint4 *)to = *(const uint4 *)from;
}

// Send the next stage on its way.
template <KvStore kForm, int kChunk>
GPU_DEVICE void fetch(Feed<kForm> &f, const Work &w, int width) {
  const int thread = mma::fresh(thread_id());
  f.into = -1;
  if (f.block <= w.last) {
    const int seen = positions_of(w, f.block), key_chunks = (seen + kChunk - 1) / kChunk;
    f.into = f.fetched % Way<kForm>::kStages;
    uint8_t *stage = w.stages + f.into * kStageBytes;
    if (f.chunk == 0) fetch_scales<kForm>(w, f.block);
    if (f.chunk < key_chunks) {
      const size_t first = ((size_t)f.block * kBlockOfKv + f.chunk * kChunk) * (width / 16);
      const int count = kChunk / 16 * width;
      GPU_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const int at = thread + i * kAttendThreads;
        const size_t unit = at < count ? first + at / 16 * 16 + mma::item_of(at % 16) : first;
        fetch_unit(f, w.kv.keys, w.kv.words, unit, stage + 16 * at, at < count, i);
      }
    } else {
      const int element = (f.chunk - key_chunks) * kValueElements;
      GPU_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const int at = thread + i * kAttendThreads, d = element + at / 256 * 16 + mma::item_of(at % 16);
        const size_t group = (size_t)f.block * 16 + at / 16 % 16;
        fetch_unit(f, w.kv.values, w.kv.words, group * width + (d < width ? d : 0), stage + 16 * at,
                   at / 16 % 16 * 16 < seen && d < width, i);
      }
    }
    ++f.fetched;
    if (++f.chunk == key_chunks + (width + kValueElements - 1) / kValueElements) ++f.block, f.chunk = 0;
  }
#if defined(HALO_MMA_SYNC)
  if (Way<kForm>::kAsync) mma::commit();
#endif
}

// Put down what came through registers.
template <KvStore kForm>
GPU_DEVICE void land(Feed<kForm> &f, const Work &w) {
  if (Way<kForm>::kAsync || f.into < 0) return;
  const int thread = mma::fresh(thread_id());
  GPU_UNROLL
  for (int i = 0; i < kCopies; ++i) {
    const int at = thread + i * kAttendThreads;
    uint4 *to = (uint4 *)(w.stages + f.into * kStageBytes) + at;
    *to = kForm == KvStore::rotor3 ? levels_of(f.low[kForm == KvStore::rotor3 ? i : 0], f.high[kForm == KvStore::rotor3 ? i : 0])
                                   : f.units[kForm == KvStore::int8 && !Way<kForm>::kAsync ? i : 0];
  }
}

// Wait for the next stage, send the one after the others on its way; where the next one lies.
template <KvStore kForm, int kChunk>
GPU_DEVICE const uint8_t *next_stage(Feed<kForm> &f, const Work &w, int width) {
#if defined(HALO_MMA_SYNC)
  if (Way<kForm>::kAsync) mma::wait<Way<kForm>::kStages - 2>();
#endif
  mma::sync_shared();
  fetch<kForm, kChunk>(f, w, width);
  return w.stages + f.used++ % Way<kForm>::kStages * kStageBytes;
}

}  // namespace prefill
}  // namespace halo
