// Ternary matrix times the activations of 1 to 16 tokens: the GEMV of decoding, and what is fused around it. A block
// takes some tiles of 8 rows; its waves share their steps, and the rows' integer sums meet in shared memory, where the
// order does not matter. Device code.
//
// One token: every block takes x through the norm and quantises it itself, while its first weights are on their way: on
// either GPU that is cheaper than a kernel of its own. Several tokens come quantised.
#pragma once
#include "arithmetic.h"
#include "codes.h"
#include "kernels.h"
#include "launch.h"

namespace halo {

const int kAhead = 4;           // steps that each wave has on their way
const int kWaves = kThreads / kWave, kWideWaves = kWideThreads / kWave;
const int kManyBytes = 40 << 10;  // of the activations that a block holds at once: several tokens

// The tiles of one block.
struct TileRange {
  int first, last;
};
GPU_DEVICE TileRange own_tiles(int tile_count) {
  return {(int)((long long)tile_count * block_id() / block_count()),
          (int)((long long)tile_count * (block_id() + 1) / block_count())};
}

// The four parts of a row lie in lanes l, l + 8, l + 16 and l + 24.
GPU_DEVICE void add_parts(int sum, int *to) {
  sum += shuffle_xor(sum, 8);
  sum += shuffle_xor(sum, 16);
  if (lane_id() < kTileRows) atomic_add(to + lane_id(), sum);
}

// Rows first..first + count of one token: out, from the integer sums.
template <int kEpilogue, int kThreadCount>
GPU_DEVICE void finish_rows(const ProductArgs &a, const int *sums, int first, int count, int token, int offset,
                            float x_scale) {
  float *out = a.out + (size_t)token * a.out_stride;
  const int each = kEpilogue == kGated ? 2 : 1;
  for (int r = thread_id() * each; r < count; r += kThreadCount * each) {
    int row = first + r;
    if (row >= a.rows) break;
    float y = scaled(sums[r], offset, a.weight_scale[row], x_scale);
    if (kEpilogue == kStore) out[row] = y;
    if (kEpilogue == kAdd) out[row] = out[row] + y;
    if (kEpilogue == kGated)
      out[row / 2] = gated(y, scaled(sums[r + 1], offset, a.weight_scale[row + 1], x_scale), a.activation);
  }
}

// A thread's first row (of the gated: its first two) of one token: the weights' scales, before the step's results are
// there, and what is added to, as soon as they are. Most blocks have no more rows than threads.
struct RowScales {
  float own, next;
};

template <int kEpilogue>
GPU_DEVICE RowScales row_scales(const ProductArgs &a, int first, int count) {
  const int r = thread_id() * (kEpilogue == kGated ? 2 : 1);
  if (r >= count || first + r >= a.rows) return {0.0f, 0.0f};
  return {a.weight_scale[first + r], kEpilogue == kGated ? a.weight_scale[first + r + 1] : 0.0f};
}

template <int kEpilogue>
GPU_DEVICE float residual(const ProductArgs &a, int first, int count) {
  if (kEpilogue != kAdd || thread_id() >= count || first + thread_id() >= a.rows) return 0.0f;
  return a.out[first + thread_id()];
}

template <int kEpilogue>
GPU_DEVICE void finish_own(const ProductArgs &a, const int *sums, int first, int count, RowFacts x, RowScales scales,
                           float before) {
  const int each = kEpilogue == kGated ? 2 : 1, r = thread_id() * each, row = first + r;
  if (r < count && row < a.rows) {
    const float y = scaled(sums[r], x.sum, scales.own, x.scale);
    if (kEpilogue == kStore) a.out[row] = y;
    if (kEpilogue == kAdd) a.out[row] = before + y;
    if (kEpilogue == kGated) a.out[row / 2] = gated(y, scaled(sums[r + 1], x.sum, scales.next, x.scale), a.activation);
  }
  const int more = kWideThreads * each;
  if (count > more) finish_rows<kEpilogue, kWideThreads>(a, sums + more, first + more, count - more, 0, x.sum, x.scale);
}

// Number `unit` of a wave's steps, if it has so many. Where nothing is staged the load is made in any case, of the last step
// at most: a load under a condition is waited for at the condition's end (hipcc), and the others with it.
GPU_DEVICE void load_ahead(uint4 &to, const uint4 *weights, int unit, int units) {
  if (kStagedBytes) {
    if (unit < units) to = load_once(weights + unit * kWave);
  } else {
    to = load_once(weights + (unit < units ? unit : units > 0 ? units - 1 : 0) * kWave);
  }
}

// Of a norm's weights, where they are staged.
GPU_HOST_DEVICE size_t norm_bytes(int n) { return kStagedBytes ? (size_t)(n + 15) / 16 * 64 : 0; }

// Shared memory of product_of_one.
GPU_HOST_DEVICE size_t one_bytes(int n, int padded, int tiles, int staged_units) {
  return kScratchBytes + row_bytes_of(n) + norm_bytes(n) + padded + (size_t)tiles * kTileRows * 4 + (size_t)staged_units * kStepBytes;
}

// How many steps of each wave lie in shared memory, of the `units` that its block has.
GPU_HOST_DEVICE int staged_steps(int units) {
  const int most = kStagedBytes / (kWideWaves * kStepBytes), own = (units + kWideWaves - 1) / kWideWaves;
  return own < most ? own : most;
}

// The weights of a step come from shared memory where they were staged, from registers behind those.
template <class Codes, int kEpilogue>
GPU_DEVICE void product_of_one(const ProductArgs &a) {
  const int padded = a.steps * Codes::kCols;
  const TileRange tiles = own_tiles(a.tile_count);
  const int units = (tiles.last - tiles.first) * a.steps;
  const int from = units * wave_id() / kWideWaves, to = units * (wave_id() + 1) / kWideWaves;
  const int first_unit = from < units ? from : units - 1;  // of a wave that has none: what may be read
  const uint4 *weights = a.tiles + ((size_t)tiles.first * a.steps + first_unit) * kWave + lane_id();
  const int count = (tiles.last - tiles.first) * kTileRows, first_row = tiles.first * kTileRows;

  uint8_t *shared = shared_memory();
  uint32_t *scratch = (uint32_t *)shared;
  float *row = (float *)(shared + kScratchBytes);
  uint4 *norm = (uint4 *)((uint8_t *)row + row_bytes_of(a.n));
  int8_t *q = (int8_t *)norm + norm_bytes(a.n);
  const int room = kStagedBytes ? staged_steps(units) : 0;  // of each wave
  uint4 *staged = (uint4 *)(q + padded) + wave_id() * room * kWave + lane_id();
  int *sums = (int *)((uint4 *)(q + padded) + kWideWaves * room * kWave);
  const int held = to - from < room ? to - from : room;
  for (int i = 0; i < held; ++i) stage(staged + i * kWave, weights + i * kWave);
  const int own_units = to - from;
  uint4 ahead[kAhead];
  GPU_UNROLL
  for (int i = 0; i < kAhead; ++i) load_ahead(ahead[i], weights, held + i, own_units);
  if (a.norm && kStagedBytes)
    for (int i = thread_id(); i < (a.n + 15) / 16 * 4; i += kWideThreads) stage(norm + i, (const uint4 *)a.norm + i);
  const RowScales scales = row_scales<kEpilogue>(a, first_row, count);
  wait_for_previous();
  const float before = residual<kEpilogue>(a, first_row, count);
  for (int i = thread_id(); i < count; i += kWideThreads) sums[i] = 0;
  if (kStagedBytes) wait_staged();  // each thread's own part of the norm, and weights that came meanwhile
  const float *weights_of_norm = a.norm && kStagedBytes ? (const float *)norm : a.norm;
  RowFacts facts = quantized_row<kWideThreads>(a.x, weights_of_norm, a.n, a.eps, padded, row, q, scratch);
  if (!facts.finite && thread_id() == 0) atomic_or(a.status, kNotFinite);

  typename Codes::Sums own;
  int tile = from / a.steps, step = from % a.steps;
  const int8_t *x = q + lane_id() / kTileRows * Codes::kPart;
  auto take = [&](const uint4 &w, bool last) {
    Codes::add(own, w, x + step * Codes::kCols);
    if (++step == a.steps || last) {
      add_parts(Codes::total(own), sums + tile * kTileRows);
      own = typename Codes::Sums();
      step = 0;
      ++tile;
    }
  };
  let_next_start();  // not before: what the next one fetches would be in the way of this one's
  for (int i = 0; i < held; ++i) take(staged[i * kWave], from + i + 1 == to);
  int unit = from + held;
  for (; unit + kAhead <= to; unit += kAhead) {
    GPU_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      uint4 w = ahead[i];
      load_ahead(ahead[i], weights, unit - from + i + kAhead, own_units);
      take(w, unit + i + 1 == to);
    }
  }
  GPU_UNROLL
  for (int i = 0; i < kAhead - 1; ++i)
    if (unit + i < to) take(ahead[i], unit + i + 1 == to);
  sync_block();
  finish_own<kEpilogue>(a, sums, first_row, count, facts, scales, before);
}

// What one wave does of a piece: units (a tile's step each), the first one's place, and the place that is loaded next.
struct UnitRange {
  int from, to, tile, step, load_tile, load_step, steps;
};

GPU_DEVICE UnitRange unit_range(int tiles, int steps) {
  const int units = tiles * steps, from = units * wave_id() / kWaves;
  const int load = from < units ? from : units - 1;
  return {from, units * (wave_id() + 1) / kWaves, from / steps, from % steps, load / steps, load % steps, steps};
}

// Move on to the unit that is loaded next, if there is one: else the last one is loaded again (see load_ahead).
GPU_DEVICE void next_unit(UnitRange &units, int unit) {
  if (unit >= units.to) return;
  if (++units.load_step == units.steps) units.load_step = 0, ++units.load_tile;
}

template <int kFew>
GPU_DEVICE void preload(uint4 (&ahead)[kFew], const uint4 *weights, UnitRange &units, int row_steps, int start) {
  GPU_UNROLL
  for (int i = 0; i < kFew; ++i) {
    ahead[i] = load_once(weights + ((size_t)units.load_tile * row_steps + start + units.load_step) * kWave);
    next_unit(units, units.from + i + 1);
  }
}

// Of up to kTokens tokens, whose int8 rows are there. Their columns pass through shared memory in pieces of whole steps.
template <class Codes, int kEpilogue, int kTokens>
GPU_DEVICE void product_of_many(const ProductArgs &a) {
  const TileRange tiles = own_tiles(a.tile_count);
  const int count = tiles.last - tiles.first;
  int piece = kManyBytes / (kTokens * Codes::kCols);
  piece = piece < a.steps ? piece : a.steps;
  const int stride = piece * Codes::kCols;
  const uint4 *weights = a.tiles + (size_t)tiles.first * a.steps * kWave + lane_id();
  const int kFew = kTokens < 16 ? 4 : 1;  // with more, the registers would not hold what hipcc reads ahead for 16 tokens
  uint4 ahead[kFew];
  UnitRange own_units = unit_range(count, piece);
  preload<kFew>(ahead, weights, own_units, a.steps, 0);
  uint8_t *shared = shared_memory();
  int8_t *q = (int8_t *)shared;
  int *sums = (int *)(q + kTokens * stride);
  let_next_start();
  wait_for_previous();
  for (int i = thread_id(); i < kTokens * count * kTileRows; i += kThreads) sums[i] = 0;
  for (int start = 0; start < a.steps; start += piece) {
    const int steps = a.steps - start < piece ? a.steps - start : piece;
    if (start) {
      own_units = unit_range(count, steps);
      preload<kFew>(ahead, weights, own_units, a.steps, start);
      sync_block();
    }
    const int words = steps * Codes::kCols / 16;
    for (int i = thread_id(); i < kTokens * words; i += kThreads) {
      int t = i / words, k = i % words;
      uint4 value = make_uint4(0, 0, 0, 0);
      if (t < a.tokens) value = ((const uint4 *)(a.q.q + (size_t)t * a.q.stride + start * Codes::kCols))[k];
      ((uint4 *)(q + t * stride))[k] = value;
    }
    sync_block();
    int own[kTokens];
    GPU_UNROLL
    for (int t = 0; t < kTokens; ++t) own[t] = 0;
    const int8_t *x = q + lane_id() / kTileRows * Codes::kPart;
    const int from = own_units.from, to = own_units.to;
    int tile = own_units.tile, step = own_units.step;
    auto take = [&](const uint4 &w, bool last) {
      Codes::template add_many<kTokens>(own, w, x + step * Codes::kCols, stride);
      if (++step == steps || last) {
        GPU_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          add_parts(own[t], sums + (t * count + tile) * kTileRows);
          own[t] = 0;
        }
        step = 0;
        ++tile;
      }
    };
    int unit = from;
    for (; unit + kFew <= to; unit += kFew) {
      GPU_UNROLL
      for (int i = 0; i < kFew; ++i) {
        uint4 w = ahead[i];
        ahead[i] = load_once(weights + ((size_t)own_units.load_tile * a.steps + start + own_units.load_step) * kWave);
        next_unit(own_units, unit + i + kFew + 1);
        take(w, unit + i + 1 == to);
      }
    }
    GPU_UNROLL
    for (int i = 0; i < kFew - 1; ++i)
      if (unit + i < to) take(ahead[i], unit + i + 1 == to);
  }
  sync_block();
  for (int t = 0; t < a.tokens; ++t)
    finish_rows<kEpilogue, kThreads>(a, sums + t * count * kTileRows, tiles.first * kTileRows, count * kTileRows, t, a.q.sum[t],
                           a.q.scale[t]);
}

#define HALO_PRODUCTS(codes, Codes)                                                                        \
  HALO_PRODUCT_KERNELS(codes, Codes, store, kStore)                                                        \
  HALO_PRODUCT_KERNELS(codes, Codes, add, kAdd)                                                            \
  HALO_PRODUCT_KERNELS(codes, Codes, gated, kGated)
#define HALO_PRODUCT_KERNELS(codes, Codes, name, epilogue)                                                 \
  GPU_KERNEL_TWO(kWideThreads) halo_##codes##_##name##_1(ProductArgs a) { product_of_one<Codes, epilogue>(a); } \
  GPU_KERNEL(kThreads) halo_##codes##_##name##_2(ProductArgs a) { product_of_many<Codes, epilogue, 2>(a); } \
  GPU_KERNEL(kThreads) halo_##codes##_##name##_4(ProductArgs a) { product_of_many<Codes, epilogue, 4>(a); } \
  GPU_KERNEL(kThreads) halo_##codes##_##name##_8(ProductArgs a) { product_of_many<Codes, epilogue, 8>(a); } \
  GPU_KERNEL(kThreads) halo_##codes##_##name##_16(ProductArgs a) { product_of_many<Codes, epilogue, 16>(a); }
HALO_PRODUCTS(two, TwoBits)
HALO_PRODUCTS(three, BaseThree)

#define HALO_PRODUCT_TABLE(codes)                                                                    \
  {                                                                                                  \
    {halo_##codes##_store_1, halo_##codes##_store_2, halo_##codes##_store_4, halo_##codes##_store_8, \
     halo_##codes##_store_16},                                                                       \
        {halo_##codes##_add_1, halo_##codes##_add_2, halo_##codes##_add_4, halo_##codes##_add_8,     \
         halo_##codes##_add_16},                                                                     \
        {halo_##codes##_gated_1, halo_##codes##_gated_2, halo_##codes##_gated_4, halo_##codes##_gated_8, \
         halo_##codes##_gated_16},                                                                   \
  }

// Shared memory of product_of_many: a piece of the activations, and the sums.
inline size_t many_bytes(int steps, int cols, int tiles, int tokens) {
  const int piece = kManyBytes / (tokens * cols);
  return (size_t)tokens * ((piece < steps ? piece : steps) * cols + tiles * kTileRows * 4);
}

// How many blocks share a matrix, none without a tile: of one token's (512 threads) one on each multiprocessor, beside
// which the next kernel's fits; of several tokens' two. An AMD multiprocessor is a pair of compute units.
inline int product_blocks(int tile_count, bool one) {
  int most = (one && device().backend != "hip" ? 1 : 2) * device().multiprocessors;
  int each = (tile_count + most - 1) / most;
  return (tile_count + each - 1) / each;
}

inline void launch_product_kernel(const ProductArgs &args, Packing packing, Epilogue epilogue, Stream &stream) {
  typedef void (*Kernel)(ProductArgs);
  static const Kernel table[2][3][5] = {HALO_PRODUCT_TABLE(two), HALO_PRODUCT_TABLE(three)};
  const int cols = step_cols(packing);
  const bool fused_row = !args.q.q;
  int blocks = product_blocks(args.tile_count, fused_row), which = 0;
  while (1 << which < args.tokens && !fused_row) ++which;
  if (!fused_row && which == 0) which = 1;
  // More blocks have fewer tiles each, whose sums take less of the shared memory.
  size_t shared;
  for (;; blocks = blocks * 2 < args.tile_count ? blocks * 2 : args.tile_count) {
    const int tiles = (args.tile_count + blocks - 1) / blocks + 1;
    shared = fused_row ? one_bytes(args.n, args.steps * cols, tiles,
                                   kStagedBytes ? kWideWaves * staged_steps(tiles * args.steps) : 0)
                       : many_bytes(args.steps, cols, tiles, 1 << which);
    if (shared <= device().shared_bytes || blocks == args.tile_count) break;
  }
  launch(table[packing == Packing::base_three][epilogue][which], {blocks}, fused_row ? kWideThreads : kThreads, shared,
         stream, args);
}

}  // namespace halo
