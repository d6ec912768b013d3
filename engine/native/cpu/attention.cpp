// Attention over the KV cache, spread over the pool. No result depends on how a batch is cut or spread: a query's sums
// over the cache are made block by block and merged in rising order, whoever made them.
#include "attention.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "model.h"

namespace halo {
namespace {

const int kTileTokens = 16;      // the positions that a step of the cache holds
const int kItemsPerThread = 8;   // with fewer items than these, blocks of the cache are items of their own
const int kSplitTokens = 16;     // ... for so many tokens at most

int blocks_of(int context) { return (context + kBlockPositions - 1) / kBlockPositions; }

}  // namespace

Attention::Attention(const AttentionShape &shape, KvForm form, const Rope &rope, const AttentionKernels &kernels,
                     Pool &pool)
    : shape_(shape),
      rope_(rope),
      kernels_(kernels),
      pool_(pool),
      cache_(shape, form, kernels),
      width_(cache_.width()),
      group_(shape.heads / shape.kv_heads),
      scale_((float)(1.0 / sqrt((double)shape.head_dim))),
      sorted_((size_t)shape.chunk),
      queries_((size_t)shape.chunk * shape.heads, width_),
      queries8_(cache_.integers() ? (size_t)shape.chunk * shape.heads : 1, width_),
      query_scales_((size_t)shape.chunk * shape.heads, 1),
      sums_((size_t)pool.threads() * 2 * kTileTokens * group_, width_),
      tops_((size_t)pool.threads() * 4, (size_t)kTileTokens * group_),
      wide_((size_t)pool.threads() * 2, width_),
      scratch_(pool.threads(), cache_.scratch_bytes()),
      split_((size_t)blocks_of(shape.context) * std::min(kSplitTokens, shape.chunk) * shape.heads, width_ + 2),
      split_rows_((size_t)std::min(kSplitTokens, shape.chunk) * shape.heads),
      left_(new std::atomic<int>[(size_t)kSplitTokens * shape.kv_heads]) {
  tiles_.reserve((size_t)shape.chunk);
}

bool Attention::run(int layer, const float *qkv, int qkv_row, const int32_t *slots, const int32_t *positions, int count,
                    float *out, int out_row) {
  plan(slots, positions, count);
  in_range_ = true;
  int items = (int)tiles_.size() * shape_.kv_heads, split = 0;
  bool alone = true;  // no tile attends to what another appends
  for (size_t i = 0; i < tiles_.size(); ++i) {
    split += tiles_[i].blocks() * shape_.kv_heads;
    alone &= i == 0 || tiles_[i].slot != tiles_[i - 1].slot;
  }
  bool whole =
      pool_.threads() == 1 || split == items || count > kSplitTokens || items >= kItemsPerThread * pool_.threads();
  Output output = {out, out_row};
  pool_.each(items, [&](int item, int thread) {
    const Tile &tile = tiles_[item / shape_.kv_heads];
    append(layer, tile, item % shape_.kv_heads, qkv, qkv_row, thread);
    if (alone && whole) attend_tile(layer, tile, item % shape_.kv_heads, thread, output);
  });
  if (alone && whole) return in_range_;
  if (whole) {
    pool_.each(items, [&](int item, int thread) {
      attend_tile(layer, tiles_[item / shape_.kv_heads], item % shape_.kv_heads, thread, output);
    });
  } else {
    span_ = (split + kItemsPerThread * pool_.threads() - 1) / (kItemsPerThread * pool_.threads());
    split = 0;
    for (const Tile &tile : tiles_) split += spans(tile) * shape_.kv_heads;
    for (int item = 0; item < items; ++item) left_[item] = spans(tiles_[item / shape_.kv_heads]);
    pool_.each(split, [&](int item, int thread) { attend_split(layer, item, thread, output); });
  }
  return in_range_;
}

void Attention::copy(int from, int to, int length) {
  pool_.each(shape_.layers * shape_.kv_heads, [&](int item, int) {
    cache_.copy(item / shape_.kv_heads, item % shape_.kv_heads, from, to, length);
  });
}

// Sort the tokens by slot, keeping their order, and cut them at each 16 positions.
void Attention::plan(const int32_t *slots, const int32_t *positions, int count) {
  count_ = count;
  for (int t = 0; t < count; ++t) {
    int at = t;
    for (; at > 0 && slots[sorted_[at - 1]] > slots[t]; --at) sorted_[at] = sorted_[at - 1];
    sorted_[at] = t;
  }
  tiles_.clear();
  for (int i = 0; i < count; ++i) {
    int slot = slots[sorted_[i]], position = positions[sorted_[i]];
    if (i == 0 || tiles_.back().slot != slot || position % kTileTokens == 0) tiles_.push_back({i, 0, slot, position});
    ++tiles_.back().tokens;
  }
}

// Copy a vector, filled up with zeros; false, and all zeros, if an element is out of range.
bool Attention::take(const float *in, float *wide) const {
  memcpy(wide, in, (size_t)shape_.head_dim * 4);
  memset(wide + shape_.head_dim, 0, (size_t)(width_ - shape_.head_dim) * 4);
  if (kernels_.in_range(wide, width_)) return true;
  memset(wide, 0, (size_t)width_ * 4);
  return false;
}

// One KV head of a tile's tokens: its queries into queries_, its keys and values into the cache.
void Attention::append(int layer, const Tile &tile, int head, const float *qkv, int qkv_row, int thread) {
  float *in = &wide_[(size_t)thread * 2 * width_], *turned = in + width_;
  const int size = shape_.head_dim, half = size / 2;
  memset(turned, 0, (size_t)width_ * 4);
  bool good = true;
  for (int t = 0; t < tile.tokens; ++t) {
    const float *row = qkv + (size_t)sorted_[tile.first + t] * qkv_row, *k = row + (size_t)shape_.heads * size;
    const float *cosine = rope_.cosine + (size_t)(tile.position + t) * rope_.row;
    const float *sine = rope_.sine + (size_t)(tile.position + t) * rope_.row;
    for (int g = 0; g < group_; ++g) {
      int at = query(tile, head) + t * group_ + g;
      good &= take(row + (size_t)(head * group_ + g) * size, in);
      float *q = &queries_[(size_t)at * width_];
      kernels_.rope(in, cosine, sine, half, q);
      put_query(at, q);
    }
    good &= take(k + (size_t)head * size, in);
    kernels_.rope(in, cosine, sine, half, turned);
    good &= take(k + (size_t)(shape_.kv_heads + head) * size, in);
    cache_.append(layer, tile.slot, head, tile.position + t, turned, in);
    memset(turned + size, 0, (size_t)(width_ - size) * 4);
  }
  if (!good) in_range_ = false;
}

// The attention's scale goes into the query; where query and key are rotated, so does what that lengthened them by.
void Attention::put_query(int at, float *q) {
  if (!cache_.integers()) {
    for (int d = 0; d < shape_.head_dim; ++d) q[d] *= scale_;
    return;
  }
  float scale = scale_;
  if (cache_.form() == KvForm::rotor3) {
    cache_.rotate(q);
    scale /= (float)shape_.head_dim;
  }
  query_scales_[at] = kernels_.to_int8(q, width_, &queries8_[(size_t)at * width_]) * scale;
}

// The sums of one block for each row. All rows see it: a tile lies within 16 positions, so within one block.
void Attention::attend_block(int layer, const Tile &tile, int head, int block, Span span, int thread,
                             const Sums &sums) {
  int limits[kRowTile], start = block * kBlockPositions, rows = tile_rows(tile);
  BlockRows b = {};
  b.limits = limits;
  int positions = std::min(kBlockPositions, tile.position + tile.tokens - start);
  cache_.block(layer, tile.slot, head, block, positions, &scratch_[(size_t)thread * cache_.scratch_bytes()], &b);
  if (cache_.form() != KvForm::rotor3) {
    bool first = span.first == block, last = span.last == block;
    b.fetch_with_keys = last ? nullptr : (const char *)b.keys + cache_.block_bytes();
    b.fetch_with_values = last ? nullptr : (const char *)b.values + cache_.block_bytes();
    if (first) b.fetch_with_keys = b.values;
  }
  auto *kernel = cache_.integers() ? kernels_.int8 : cache_.form() == KvForm::f16 ? kernels_.f16 : kernels_.f32;
  for (int r = 0; r < rows; r += kRowTile) {
    size_t at = (size_t)query(tile, head) + r;
    b.rows = std::min(kRowTile, rows - r);
    if (r > 0) b.fetch_with_keys = b.fetch_with_values = nullptr;
    for (int i = 0; i < b.rows; ++i)
      limits[i] = std::min(kBlockPositions, tile.position + (r + i) / group_ + 1 - start);
    b.q = &queries_[at * width_];
    b.q8 = cache_.integers() ? &queries8_[at * width_] : nullptr;
    b.q_scales = &query_scales_[at];
    Partial result = row(sums, r);
    b.tops = result.top;
    b.totals = result.total;
    b.sums = result.sums;
    kernel(b);
  }
}

Attention::Sums Attention::thread_sums(int thread, int which) {
  size_t rows = (size_t)kTileTokens * group_, at = (size_t)thread * 2 + which;
  return {&tops_[2 * at * rows], &tops_[(2 * at + 1) * rows], &sums_[at * rows * width_]};
}

void Attention::attend_tile(int layer, const Tile &tile, int head, int thread, const Output &out) {
  Sums all = thread_sums(thread, 0), one = thread_sums(thread, 1);
  Span span = {0, tile.blocks() - 1};
  attend_block(layer, tile, head, 0, span, thread, all);
  for (int block = 1; block < tile.blocks(); ++block) {
    attend_block(layer, tile, head, block, span, thread, one);
    for (int r = 0; r < tile_rows(tile); ++r) kernels_.merge(row(all, r), row(one, r), width_);
  }
  finish(tile, head, all, thread, out);
}

Attention::Sums Attention::split_sums(const Tile &tile, int head, int block) {
  size_t at = (size_t)block * split_rows_, row = (size_t)(head * count_ + tile.first) * group_;
  float *base = split_.get() + at * (width_ + 2);
  return {base + row, base + split_rows_ + row, base + 2 * split_rows_ + row * width_};
}

// Some blocks of a tile; whoever makes the last one merges them.
void Attention::attend_split(int layer, int item, int thread, const Output &out) {
  int index = 0;
  while (item >= spans(tiles_[index]) * shape_.kv_heads) item -= spans(tiles_[index++]) * shape_.kv_heads;
  const Tile &tile = tiles_[index];
  int head = item / spans(tile), first = item % spans(tile) * span_, block;
  Span span = {first, std::min(first + span_, tile.blocks()) - 1};
  for (block = span.first; block <= span.last; ++block)
    attend_block(layer, tile, head, block, span, thread, split_sums(tile, head, block));
  if (left_[index * shape_.kv_heads + head].fetch_sub(1) != 1) return;
  Sums all = split_sums(tile, head, 0);
  for (block = 1; block < tile.blocks(); ++block) {
    Sums one = split_sums(tile, head, block);
    for (int r = 0; r < tile_rows(tile); ++r) kernels_.merge(row(all, r), row(one, r), width_);
  }
  finish(tile, head, all, thread, out);
}

void Attention::finish(const Tile &tile, int head, const Sums &sums, int thread, const Output &out) {
  float *wide = &wide_[(size_t)thread * 2 * width_];
  float shorter = 1.0f / (float)shape_.head_dim;
  for (int r = 0; r < tile_rows(tile); ++r) {
    kernels_.finish(sums.sums + (size_t)r * width_, sums.totals[r], width_, wide);
    if (cache_.form() == KvForm::rotor3) {
      cache_.rotate_back(wide);
      for (int d = 0; d < width_; ++d) wide[d] *= shorter;
    }
    float *to = out.out + (size_t)sorted_[tile.first + r / group_] * out.row;
    memcpy(to + (size_t)(head * group_ + r % group_) * shape_.head_dim, wide, (size_t)shape_.head_dim * 4);
  }
}

}  // namespace halo
