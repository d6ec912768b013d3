// Attention of many tokens over the KV cache of one layer, integer forms: RoPE and rounding of the queries, scores and
// value sums on the matrix units, exactly; what is between them to the last bit as engine/kv_forms.py says. Device code.
//
// A block of 4 waves takes one tile of tokens and one KV head: up to 64 queries (tokens times the query heads that share
// the head), 16 a wave. It walks the blocks of 256 positions in rising order. The scores of a wave's 16 queries with all
// 256 positions stay in registers (128 a lane), become weights there, and their two bytes go back into the matrix unit
// as its operand without passing through memory: mma.h chooses the order of positions for that. Sums over the values
// come out 16 elements at a time. What is merged from block to block lies in the output row, which its lane alone reads.
//
// Shared memory: queries (64 x width), scales of two blocks of positions (4 KB), and two or three stages of 8 KB: keys
// (64 positions x width, or 32 beyond a width of 128) or values (256 positions x 32 elements). Each 16 units of 16
// bytes, positions of the keys or elements of the values, are 256 bytes in a row, so the lanes that read them together
// have no bank in common. 28 KB at a width of 128 on gfx1151, 36 KB at 256.
#pragma once
#include "launch.h"
#include "prefill_stages.h"

namespace halo {
namespace prefill {

// What a lane knows of its queries in one block of positions.
struct LaneRows {
  int limit[mma::kLaneQueries];  // positions that they see
  float scale[mma::kLaneQueries];
  float top[mma::kLaneQueries], total[mma::kLaneQueries], unit[mma::kLaneQueries];
};

// Scores of a stage's positions.
template <int kChunk>
GPU_DEVICE void score_chunk(const uint8_t *stage, const uint8_t *queries, int width, int (*sums)[8]) {
  for (int k = 0; k < width / 16; k += 2) {
    const mma::Operand q = mma::load_queries(queries + k * 256);
    const int stride = k + 1 < width / 16 ? 512 : 0;  // the query is zero where there is no key
    GPU_UNROLL
    for (int u = 0; u < kChunk / 16; ++u)
      mma::multiply<true>(sums[u], mma::load_items(stage + u / 2 * width * 32 + u % 2 * 256 + k * 512, stride), q);
  }
}

// Over the lanes that share a query.
GPU_DEVICE float largest_of_lanes(float x) {
  GPU_UNROLL
  for (int far = mma::kRunLanes; far < mma::kRunLanes * 16 / mma::kRun; far *= 2) {
    const float other = shuffle_xor(x, far);
    x = other > x ? other : x;
  }
  return x;
}

// Scales of a lane's run. At once where that is one load; gfx11 has no registers left for more than one at a time.
struct Run {
#if defined(HALO_MMA_SYNC)
  uint4 four;
#else
  const float *from;
#endif
};
GPU_DEVICE Run run_at(const float *from) {
#if defined(HALO_MMA_SYNC)
  return {*(const uint4 *)from};
#else
  return {from};
#endif
}
GPU_DEVICE float of_run(const Run &r, int i) {
#if defined(HALO_MMA_SYNC)
  return float_of(word_at(r.four, i));
#else
  return r.from[i];
#endif
}

const uint32_t kHidden = 0xff800000u;  // the score of a position that is not seen: -inf

// Sums to scores (as bits), and the largest.
GPU_DEVICE void finish_scores(int (&sums)[16][8], const float *key_scales, int pairs, LaneRows &r) {
  const int first = mma::fresh(mma::run_of_lane() * mma::kRun);
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) r.top[q] = float_of(kHidden);
  GPU_UNROLL
  for (int u = 0; u < 16; ++u) {
    if (u / 2 >= pairs) continue;
    const Run scales = run_at(key_scales + 16 * u + first);
    GPU_UNROLL
    for (int i = 0; i < mma::kRun; ++i) {
      GPU_UNROLL
      for (int q = 0; q < mma::kLaneQueries; ++q) {
        int &sum = sums[u][mma::result(q, i)];
        float score = (float)sum * of_run(scales, i) * r.scale[q];
        if (16 * u + first + i >= r.limit[q]) score = float_of(kHidden);
        r.top[q] = score > r.top[q] ? score : r.top[q];
        sum = (int)bits_of(score);
      }
    }
  }
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) r.top[q] = largest_of_lanes(r.top[q]);
}

// Sixteen lanes' sums, of which this lane has a run, as a tree.
GPU_DEVICE float tree_of_run(float (&lanes)[mma::kRun]) {
  GPU_UNROLL
  for (int half = 8; half; half /= 2) {
    GPU_UNROLL
    for (int i = 0; i < (half < mma::kRun ? half : mma::kRun); ++i)
      lanes[i] = lanes[i] + (half < mma::kRun ? lanes[(i + half) % mma::kRun]
                                              : shuffle_xor(lanes[i], half / mma::kRun * mma::kRunLanes));
  }
  return lanes[0];
}

// Scores to weights times the values' scales (as bits); what a unit of 15 bits of them is worth.
GPU_DEVICE void finish_weights(int (&sums)[16][8], const float *value_scales, int pairs, LaneRows &r) {
  const int first = mma::fresh(mma::run_of_lane() * mma::kRun);
  float most[mma::kLaneQueries], lanes[mma::kLaneQueries][mma::kRun] = {};
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) most[q] = 1e-30f;
  GPU_UNROLL
  for (int u = 0; u < 16; ++u) {
    if (u / 2 >= pairs) continue;
    const Run scales = run_at(value_scales + 16 * u + first);
    GPU_UNROLL
    for (int i = 0; i < mma::kRun; ++i) {
      GPU_UNROLL
      for (int q = 0; q < mma::kLaneQueries; ++q) {
        int &sum = sums[u][mma::result(q, i)];
        const bool hidden = (uint32_t)sum == kHidden;
        const float weight = hidden ? 0.0f : exp_of(float_of((uint32_t)sum) - r.top[q]);
        const float scaled_weight = hidden ? 0.0f : weight * of_run(scales, i);
        lanes[q][i] = lanes[q][i] + weight;
        most[q] = scaled_weight > most[q] ? scaled_weight : most[q];
        sum = (int)bits_of(scaled_weight);
      }
    }
  }
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    r.total[q] = tree_of_run(lanes[q]);
    r.unit[q] = largest_of_lanes(most[q]);
  }
}

// Weights of 16 positions to their two bytes: the upper (0 to 127) and the lower.
GPU_DEVICE void split_weights(const int (&sums)[8], const float *factor, mma::Bytes &high, mma::Bytes &low) {
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    GPU_UNROLL
    for (int j = 0; j < mma::kRun / 4; ++j) {
      uint32_t v[4];  // 1.5 * 2^23 + x has the whole number nearest to x in its lower bits, half to even
      GPU_UNROLL
      for (int b = 0; b < 4; ++b)
        v[b] = bits_of(float_of((uint32_t)sums[mma::result(q, 4 * j + b)]) * factor[q] + 12582912.0f);
      const uint32_t left = pick_bytes(v[0], v[1], 0x05010400u), right = pick_bytes(v[2], v[3], 0x05010400u);
      low.w[q][j] = pick_bytes(left, right, 0x05040100u);
      high.w[q][j] = pick_bytes(left, right, 0x07060302u);
    }
  }
}

// Sums of a block's scores to weights in two bytes, and what the lane's queries have of the block.
GPU_DEVICE void weigh_block(const Work &w, int block, int (&sums)[16][8], LaneRows &r, mma::Bytes (&high)[16],
                            mma::Bytes (&low)[16]) {
  const int seen = positions_of(w, block), pairs = (seen + 31) / 32;
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    const int row = mma::own_wave() * 16 + mma::query_of_lane(q);
    const int limit = w.tile.position % kBlockOfKv + row / w.group + 1;
    r.limit[q] = block < w.last ? kBlockOfKv : limit < seen ? limit : seen;
    r.scale[q] = w.q_scales[row];
  }
  const float *scales = (const float *)(w.scales + block % 2 * kScaleBytes);
  finish_scores(sums, scales, pairs, r);
  finish_weights(sums, scales + kBlockOfKv, pairs, r);
  float factor[mma::kLaneQueries];
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    factor[q] = 32767.0f / r.unit[q];
    r.unit[q] = r.unit[q] / 32767.0f;
  }
  GPU_UNROLL
  for (int u = 0; u < 16; ++u)
    if (u / 2 < pairs) split_weights(sums[u], factor, high[u], low[u]);
}

// What has been merged so far of a lane's queries; this block's share of the sums, and theirs.
struct Merged {
  float top[mma::kLaneQueries], total[mma::kLaneQueries];
  float keep[mma::kLaneQueries], take[mma::kLaneQueries];  // exp of the old and the new top under the larger
};

GPU_DEVICE void merge_tops(Merged &m, const LaneRows &r, bool first) {
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    if (first) {
      m.top[q] = r.top[q], m.total[q] = r.total[q];
      continue;
    }
    const float top = m.top[q] > r.top[q] ? m.top[q] : r.top[q];
    m.keep[q] = exp_of(m.top[q] - top);
    m.take[q] = exp_of(r.top[q] - top);
    m.total[q] = fused(m.total[q], m.keep[q], r.total[q] * m.take[q]);
    m.top[q] = top;
  }
}

// Where a lane's queries have their results; -1 beyond the tile's.
struct LaneOutput {
  float *out;
  int row[mma::kLaneQueries];  // where it begins
  int size;        // head_dim
  bool by_fours;   // 16 bytes at once
  bool first, last;  // of the blocks
};

GPU_DEVICE LaneOutput lane_output(const AttentionArgs &a, const Work &w) {
  LaneOutput o;
  o.out = a.out;
  o.size = a.kv.head_dim;
  o.by_fours = a.kv.head_dim % 4 == 0 && a.out_stride % 4 == 0;
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    const int row = mma::own_wave() * 16 + mma::query_of_lane(q);
    o.row[q] = row < w.rows ? (w.tile.first + row / w.group) * a.out_stride + (w.head * w.group + row % w.group) * o.size
                            : -1;
  }
  return o;
}

// Four neighbouring elements of one query: this block's sums into those of the blocks before.
GPU_DEVICE void put_four(const LaneOutput &o, const Merged &m, int q, int d, float (&x)[4]) {
  float *to = o.out + o.row[q] + d, old[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const int some = o.size - d < 4 ? o.size - d : 4;
  if (!o.first) {
    if (o.by_fours) {
      const uint4 v = *(const uint4 *)to;
      old[0] = float_of(v.x), old[1] = float_of(v.y), old[2] = float_of(v.z), old[3] = float_of(v.w);
    } else {
      for (int i = 0; i < some; ++i) old[i] = to[i];
    }
  }
  GPU_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (!o.first) x[i] = fused(old[i], m.keep[q], x[i] * m.take[q]);
    if (o.last) x[i] = x[i] / m.total[q];
  }
  if (o.by_fours) {
    *(uint4 *)to = make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
  } else {
    for (int i = 0; i < some; ++i) to[i] = x[i];
  }
}

// One lane's sums of 16 elements to where they go.
GPU_DEVICE void put_sums(const int (&upper)[8], const int (&lower)[8], int element, const LaneRows &r, const Merged &m,
                         const LaneOutput &o) {
  GPU_UNROLL
  for (int q = 0; q < mma::kLaneQueries; ++q) {
    GPU_UNROLL
    for (int j = 0; j < mma::kRun; j += 4) {
      const int d = element + mma::fresh(mma::run_of_lane() * mma::kRun) + j;
      if (o.row[q] < 0 || d >= o.size) continue;
      float x[4];
      GPU_UNROLL
      for (int i = 0; i < 4; ++i)
        x[i] = (float)(upper[mma::result(q, j + i)] * 256 + lower[mma::result(q, j + i)]) * r.unit[q];
      put_four(o, m, q, d, x);
    }
  }
}

// Sums of 32 elements at `stage` [element / 16][position / 16][16 units][16 bytes] with the weights of 256 positions.
// Where there are but 16, the others are nobody's.
GPU_DEVICE void sum_values(const uint8_t *stage, int element, const mma::Bytes (&high)[16], const mma::Bytes (&low)[16],
                           int pairs, const LaneRows &r, const Merged &m, const LaneOutput &o) {
  int upper[2][8] = {}, lower[2][8] = {};
  GPU_UNROLL
  for (int k = 0; k < 8; ++k) {
    if (k >= pairs) continue;
    const mma::Operand top = mma::turn_results(high[2 * k], high[2 * k + 1]);
    const mma::Operand rest = mma::turn_results(low[2 * k], low[2 * k + 1]);
    GPU_UNROLL
    for (int half = 0; half < 2; ++half) {
      const mma::Operand items = mma::load_items(stage + half * 4096 + k * 512, 256);
      mma::multiply<true>(upper[half], items, top);
      mma::multiply<false>(lower[half], items, rest);
    }
  }
  GPU_UNROLL
  for (int half = 0; half < 2; ++half) put_sums(upper[half], lower[half], element + 16 * half, r, m, o);
}

// The sums of rotated values, turned back: each wave's rows of the output.
GPU_DEVICE void turn_rows_back(const AttentionArgs &a, const Work &w) {
  const int size = a.kv.head_dim;
  const float shorter = 1.0f / (float)size;
  float *four = (float *)w.stages + mma::own_wave() * 4 * size;
  sync_block();
  for (int batch = 0; batch < 16; batch += 4) {
    const int first = mma::own_wave() * 16 + batch;
    for (int pass = 0; pass < 2; ++pass) {
      for (int i = lane_id(); i < 4 * size; i += kWave) {
        const int row = first + i / size, d = i % size;
        if (row >= w.rows) continue;
        float *at = a.out + (size_t)(w.tile.first + row / w.group) * a.out_stride +
                    (w.head * w.group + row % w.group) * size + d;
        if (pass == 0) four[i] = *at;
        if (pass == 1) *at = four[i] * rotation_sign(d) * shorter;
      }
      sync_block();
      if (pass == 0) hadamard_rows(four, size);
    }
  }
}

// Grid: tiles, KV heads. kChunk: positions of a stage of keys.
template <KvStore kForm, int kChunk>
GPU_DEVICE void attend(const PrefillAttentionArgs &a) {
  let_next_start();
  wait_for_previous();
  const Work w = work_of(a, kForm);
  const int width = a.base.kv.width;
  prepare_rows<kForm>(a.base, w, a.query_units);
  const uint8_t *queries = w.queries + mma::own_wave() * a.query_units * 256;
  LaneOutput output = lane_output(a.base, w);
  LaneRows rows;
  Merged merged = {};
  Feed<kForm> feed;
  GPU_UNROLL
  for (int s = 0; s < Way<kForm>::kStages - 1; ++s) {
    fetch<kForm, kChunk>(feed, w, width);
    land(feed, w);
  }
  for (int block = 0; block <= w.last; ++block) {
    const int seen = positions_of(w, block), pairs = (seen + 31) / 32;
    output.first = block == 0, output.last = block == w.last;
    int sums[16][8] = {};
    GPU_UNROLL
    for (int c = 0; c < kBlockOfKv / kChunk; ++c) {
      if (c * kChunk >= seen) continue;
      const uint8_t *stage = next_stage<kForm, kChunk>(feed, w, width);
      score_chunk<kChunk>(stage, queries, width, sums + kChunk / 16 * c);
      land(feed, w);
    }
    mma::Bytes high[16], low[16];
    weigh_block(w, block, sums, rows, high, low);
    merge_tops(merged, rows, block == 0);
    for (int element = 0; element < width; element += kValueElements) {
      const uint8_t *stage = next_stage<kForm, kChunk>(feed, w, width);
      sum_values(stage, element, high, low, pairs, rows, merged, output);
      land(feed, w);
    }
  }
  if (kForm == KvStore::rotor3) turn_rows_back(a.base, w);
}

GPU_KERNEL(kAttendThreads) halo_prefill_int8(PrefillAttentionArgs a) { attend<KvStore::int8, 64>(a); }
GPU_KERNEL(kAttendThreads) halo_prefill_int8_256(PrefillAttentionArgs a) { attend<KvStore::int8, 32>(a); }
GPU_KERNEL(kAttendThreads) halo_prefill_rotor3(PrefillAttentionArgs a) { attend<KvStore::rotor3, 64>(a); }
GPU_KERNEL(kAttendThreads) halo_prefill_rotor3_256(PrefillAttentionArgs a) { attend<KvStore::rotor3, 32>(a); }

inline void launch_integer_attention(PrefillAttentionArgs args, KvStore form, Stream &stream) {
  const bool narrow = args.base.kv.width <= 128, int8 = form == KvStore::int8;
  args.query_units = (args.base.kv.width + 31) / 32 * 2;
  args.query_bytes = kAttendWaves * args.query_units * 256;
  const int stages = int8 ? Way<KvStore::int8>::kStages : Way<KvStore::rotor3>::kStages;
  const size_t shared = 4 * kPrefillRows + 2 * kScaleBytes + args.query_bytes + (size_t)stages * kStageBytes;
  void (*kernel)(PrefillAttentionArgs) = int8 ? narrow ? halo_prefill_int8 : halo_prefill_int8_256
                                              : narrow ? halo_prefill_rotor3 : halo_prefill_rotor3_256;
  launch(kernel, {args.tile_count, args.base.kv.kv_heads}, kAttendThreads, shared, stream, args);
}

}  // namespace prefill
}  // namespace halo
