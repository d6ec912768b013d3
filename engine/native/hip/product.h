// Ternary matrix times the activations of 1 to 16 tokens: the GEMV of decoding, and what is fused around it. A block
// takes some tiles of 8 rows; its waves share their steps, and the rows' integer sums meet in shared memory, where the
// order does not matter. Device code.
//
// One token: every block takes x through the norm and quantises it itself, while its first weights are on their way: on
// either GPU that is cheaper than a kernel of its own. Several tokens come quantised, and one may.
#pragma once
#include "arithmetic.h"
#include "codes.h"
#include "kernels.h"
#include "launch.h"

namespace halo {

const int kAhead = 4;           // steps that each wave has on their way
const int kWaves = kThreads / kWave, kWideWaves = kWideThreads / kWave;
const int kManyBytes = 40 << 10;  // of the activations that a block holds at once: several tokens

// The tiles of one block: those of a vocabulary, times the blocks, are below 2^31.
struct TileRange {
  int first, last;
};
GPU_DEVICE TileRange own_tiles(int tile_count) {
  return {tile_count * block_id() / block_count(), tile_count * (block_id() + 1) / block_count()};
}

// The four parts of a row lie in lanes l, l + 8, l + 16 and l + 24.
GPU_DEVICE void add_parts(int sum, int *to) {
  sum += shuffle_xor(sum, 8);
  sum += shuffle_xor(sum, 16);
  if (lane_id() < kTileRows) atomic_add(to + lane_id(), sum);
}

// Rows first..first + count of one token: out, from the integer sums. What is done with them is no constant of a kernel:
// the products of a layer share one code, which the multiprocessors' instruction caches then hold.
template <int kThreadCount>
GPU_DEVICE void finish_rows(const ProductArgs &a, const int *sums, int first, int count, int token, int offset,
                            float x_scale) {
  float *out = a.out + (size_t)token * a.out_stride;
  const int each = a.epilogue == kGated ? 2 : 1;
  for (int r = thread_id() * each; r < count; r += kThreadCount * each) {
    int row = first + r;
    if (row >= a.rows) break;
    float y = scaled(sums[r], offset, a.weight_scale[row], x_scale);
    if (a.epilogue == kStore) out[row] = y;
    if (a.epilogue == kAdd) out[row] = out[row] + y;
    if (a.epilogue == kGated)
      out[row / 2] = gated(y, scaled(sums[r + 1], offset, a.weight_scale[row + 1], x_scale), a.activation);
  }
}

// A thread's first row (of the gated: its first two) of one token: the weights' scales, before the step's results are
// there, and what is added to, as soon as they are. Most blocks have no more rows than threads.
struct RowScales {
  float own, next;
};

GPU_DEVICE RowScales row_scales(const ProductArgs &a, int first, int count) {
  const int r = thread_id() * (a.epilogue == kGated ? 2 : 1);
  if (r >= count || first + r >= a.rows) return {0.0f, 0.0f};
  return {a.weight_scale[first + r], a.epilogue == kGated ? a.weight_scale[first + r + 1] : 0.0f};
}

GPU_DEVICE float residual(const ProductArgs &a, int first, int count) {
  if (a.epilogue != kAdd || thread_id() >= count || first + thread_id() >= a.rows) return 0.0f;
  return a.out[first + thread_id()];
}

GPU_DEVICE void finish_own(const ProductArgs &a, const int *sums, int first, int count, RowFacts x, RowScales scales,
                           float before) {
  const int each = a.epilogue == kGated ? 2 : 1, r = thread_id() * each, row = first + r;
  if (r < count && row < a.rows) {
    const float y = scaled(sums[r], x.sum, scales.own, x.scale);
    if (a.epilogue == kStore) a.out[row] = y;
    if (a.epilogue == kAdd) a.out[row] = before + y;
    if (a.epilogue == kGated) a.out[row / 2] = gated(y, scaled(sums[r + 1], x.sum, scales.next, x.scale), a.activation);
  }
  const int more = kWideThreads * each;
  if (count > more) finish_rows<kWideThreads>(a, sums + more, first + more, count - more, 0, x.sum, x.scale);
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

// How many of a block's steps lie in shared memory.
GPU_HOST_DEVICE int staged_steps(int units) { return units < kStagedBytes / kStepBytes ? units : kStagedBytes / kStepBytes; }

// The one row as it was quantised before, to shared memory.
template <int kThreadCount>
GPU_DEVICE RowFacts taken_row(const Int8Rows &from, int padded, int8_t *q) {
  for (int i = thread_id(); i < padded / 16; i += kThreadCount) ((uint4 *)q)[i] = ((const uint4 *)from.q)[i];
  const RowFacts facts = {from.scale[0], from.sum[0], true};
  sync_block();
  return facts;
}

// What a wave does of a block's steps, `from` to `to`, of which `held` come through shared memory; the first one's place.
struct WaveShare {
  int from, to, tile, step, held;
};

// The weights of a step come from shared memory where they were staged, from registers behind those.
template <class Codes>
GPU_DEVICE void wave_sums(const WaveShare &own, int steps, const uint4 *staged, const uint4 *weights, uint4 (&ahead)[kAhead],
                          const int8_t *q, int *sums) {
  int tile = own.tile, step = own.step, unit = own.from;
  const int staged_end = own.from + own.held;
  typename Codes::Sums sum;
  const int8_t *x = q + lane_id() / kTileRows * Codes::kPart;
  auto take = [&](const uint4 &w, bool last) {
    Codes::add(sum, w, x + step * Codes::kCols);
    if (++step == steps || last) {
      add_parts(Codes::total(sum), sums + tile * kTileRows);
      sum = typename Codes::Sums();
      step = 0;
      ++tile;
    }
  };
  for (; unit < staged_end; ++unit) take(staged[unit * kWave + lane_id()], unit + 1 == own.to);
  for (; unit + kAhead <= own.to; unit += kAhead) {
    GPU_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      uint4 w = ahead[i];
      load_ahead(ahead[i], weights, unit - own.from + i + kAhead, own.to - own.from);
      take(w, unit + i + 1 == own.to);
    }
  }
  GPU_UNROLL
  for (int i = 0; i + 1 < kAhead; ++i)
    if (unit + i < own.to) take(ahead[i], unit + i + 1 == own.to);
}

template <class Codes>
GPU_DEVICE void product_of_one(const ProductArgs &a) {
  const int padded = a.steps * Codes::kCols;
  const TileRange tiles = own_tiles(a.tile_count);
  const int units = (tiles.last - tiles.first) * a.steps, room = staged_steps(units);
  const int from = units * wave_id() / kWideWaves, to = units * (wave_id() + 1) / kWideWaves;
  const int held = room > from ? (room < to ? room : to) - from : 0;
  const uint4 *block_weights = a.tiles + (size_t)tiles.first * a.steps * kWave;
  // Of a wave that has none: what may be read.
  const uint4 *weights = block_weights + (from < units ? from : units - 1) * kWave + lane_id();
  const int count = (tiles.last - tiles.first) * kTileRows, first_row = tiles.first * kTileRows;

  uint8_t *shared = shared_memory();
  uint32_t *scratch = (uint32_t *)shared;
  uint64_t *norm_staging = (uint64_t *)(shared + kScratchBytes) - 2, *staging = norm_staging + 1;
  float *row = (float *)(shared + kScratchBytes);
  uint4 *norm = (uint4 *)((uint8_t *)row + row_bytes_of(a.n));
  int8_t *q = (int8_t *)norm + norm_bytes(a.n);
  uint4 *staged = (uint4 *)(q + padded);
  int *sums = (int *)(staged + room * kWave);
  const bool stages_norm = kStagedBytes && a.norm && !a.q.q;
  if (kStagedBytes && thread_id() == 0) {
    const int norm_size = stages_norm ? (int)norm_bytes(a.n) : 0;
    begin_staging(norm_staging);
    begin_staging(staging);
    expect_staged(norm_staging, norm_size);
    if (norm_size) stage(norm_staging, norm, a.norm, norm_size);
    expect_staged(staging, room * kStepBytes);
    if (room) stage(staging, staged, block_weights, room * kStepBytes);
  }
  uint4 ahead[kAhead];
  GPU_UNROLL
  for (int i = 0; i < kAhead; ++i) load_ahead(ahead[i], weights, held + i, to - from);
  const RowScales scales = row_scales(a, first_row, count);
  if (a.q.q) let_next_start();  // its weights take turns with this one's, and there is little else to do
  wait_for_previous();
  const float before = residual(a, first_row, count);
  for (int i = thread_id(); i < count; i += kWideThreads) sums[i] = 0;
  if (kStagedBytes) {
    sync_block();  // before that, nobody knows of the stagings
    wait_staged(norm_staging, 0);
  }
  const float *weights_of_norm = stages_norm ? (const float *)norm : a.norm;
  const RowFacts facts = a.q.q ? taken_row<kWideThreads>(a.q, padded, q)
                               : quantized_row<kWideThreads>(a.x, weights_of_norm, a.n, a.eps, padded, row, q, scratch);
  if (!facts.finite && thread_id() == 0) atomic_or(a.status, kNotFinite);
  let_next_start();  // not before: what the next one fetches would be in the way of this one's
  if (kStagedBytes) wait_staged(staging, 0);
  wave_sums<Codes>({from, to, from / a.steps, from % a.steps, held}, a.steps, staged, weights, ahead, q, sums);
  sync_block();
  finish_own(a, sums, first_row, count, facts, scales, before);
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
template <class Codes, int kTokens>
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
    finish_rows<kThreads>(a, sums + t * count * kTileRows, tiles.first * kTileRows, count * kTileRows, t, a.q.sum[t],
                           a.q.scale[t]);
}

#define HALO_PRODUCTS(codes, Codes)                                                                     \
  GPU_KERNEL_TWO(kWideThreads) halo_##codes##_1(ProductArgs a) { product_of_one<Codes>(a); }            \
  GPU_KERNEL(kThreads) halo_##codes##_2(ProductArgs a) { product_of_many<Codes, 2>(a); }                \
  GPU_KERNEL(kThreads) halo_##codes##_4(ProductArgs a) { product_of_many<Codes, 4>(a); }                \
  GPU_KERNEL(kThreads) halo_##codes##_8(ProductArgs a) { product_of_many<Codes, 8>(a); }                \
  GPU_KERNEL(kThreads) halo_##codes##_16(ProductArgs a) { product_of_many<Codes, 16>(a); }
HALO_PRODUCTS(two, TwoBits)
HALO_PRODUCTS(three, BaseThree)

#define HALO_PRODUCT_TABLE(codes) {halo_##codes##_1, halo_##codes##_2, halo_##codes##_4, halo_##codes##_8, halo_##codes##_16}

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

inline void launch_product_kernel(const ProductArgs &args, Packing packing, Stream &stream) {
  typedef void (*Kernel)(ProductArgs);
  static const Kernel table[2][5] = {HALO_PRODUCT_TABLE(two), HALO_PRODUCT_TABLE(three)};
  const int cols = step_cols(packing);
  const bool one = args.tokens == 1;
  int blocks = product_blocks(args.tile_count, one), which = 0;
  while (1 << which < args.tokens) ++which;
  // More blocks have fewer tiles each, whose sums take less of the shared memory.
  size_t shared;
  for (;; blocks = blocks * 2 < args.tile_count ? blocks * 2 : args.tile_count) {
    const int tiles = (args.tile_count + blocks - 1) / blocks + 1;
    shared = one ? one_bytes(args.n, args.steps * cols, tiles,
                             staged_steps(tiles * args.steps))
                 : many_bytes(args.steps, cols, tiles, 1 << which);
    if (shared <= device().shared_bytes || blocks == args.tile_count) break;
  }
  launch(table[packing == Packing::base_three][which], {blocks}, one ? kWideThreads : kThreads, shared,
         stream, args);
}

}  // namespace halo
