// The attention of a session: RoPE, the KV cache, and the weighted sum over it. Not the projections around it.
#pragma once
#include <atomic>
#include <memory>
#include <vector>

#include "attention_kernels.h"
#include "buffer.h"
#include "cache.h"
#include "pool.h"

namespace halo {

// RoPE's tables: row p holds the cosines and sines of position p.
struct Rope {
  const float *cosine, *sine;
  int row;
};

class Attention {
 public:
  // The tables that `rope` points to, the kernels and the pool must outlive this.
  Attention(const AttentionShape &shape, KvForm form, const Rope &rope, const AttentionKernels &kernels, Pool &pool);

  // Append `count` tokens to the cache of `layer` and attend. Row t of qkv, `qkv_row` floats apart, holds token t's
  // queries, keys and values (heads, kv_heads and kv_heads vectors of head_dim floats); row t of out gets its heads.
  // No two tokens may share slot and position, and those of a slot stand in rising order of position, without a gap.
  // False if an element is not finite or beyond 2^40; it counted as zero, and the results are of no use.
  bool run(int layer, const float *qkv, int qkv_row, const int32_t *slots, const int32_t *positions, int count,
           float *out, int out_row);

  // Copy the keys and values of a slot's first `length` positions to another slot.
  void copy(int from, int to, int length);

  const char *form() const { return kv_name(cache_.form()); }
  size_t bytes() const { return cache_.bytes(); }

 private:
  // Tokens of one slot that lie in the same 16 positions, and so in one block: `first` and on in sorted_.
  struct Tile {
    int first, tokens, slot, position;
    int blocks() const { return (position + tokens - 1) / kBlockPositions + 1; }
  };
  struct Output {
    float *out;
    int row;
  };
  // Blocks that one thread walks after one another.
  struct Span {
    int first, last;
  };
  // A place for one query's sums.
  struct Sums {
    float *tops, *totals, *sums;
  };

  void plan(const int32_t *slots, const int32_t *positions, int count);
  void append(int layer, const Tile &tile, int head, const float *qkv, int qkv_row, int thread);
  bool take(const float *in, float *wide) const;
  void put_query(int at, float *q);
  void attend_block(int layer, const Tile &tile, int head, int block, Span span, int thread, const Sums &sums);
  void attend_tile(int layer, const Tile &tile, int head, int thread, const Output &out);
  void attend_split(int layer, int item, int thread, const Output &out);
  void finish(const Tile &tile, int head, const Sums &sums, int thread, const Output &out);
  Partial row(const Sums &sums, int r) const { return {sums.tops + r, sums.totals + r, sums.sums + (size_t)r * width_}; }
  int query(const Tile &tile, int head) const { return (head * shape_.chunk + tile.first) * group_; }
  int spans(const Tile &tile) const { return (tile.blocks() + span_ - 1) / span_; }
  int tile_rows(const Tile &tile) const { return tile.tokens * group_; }
  Sums thread_sums(int thread, int which);
  Sums split_sums(const Tile &tile, int head, int block);

  const AttentionShape shape_;
  const Rope rope_;
  const AttentionKernels &kernels_;
  Pool &pool_;
  KvCache cache_;
  const int width_, group_;  // group_: query heads that share a KV head
  const float scale_;
  std::vector<int> sorted_;  // the tokens of a run, by slot
  std::vector<Tile> tiles_;
  int count_ = 0, span_ = 1;
  std::atomic<bool> in_range_{true};
  Buffer<float> queries_;      // [kv head][token of sorted_][group][width]: scaled
  Buffer<int8_t> queries8_;    // the same of the integer forms
  Buffer<float> query_scales_;
  Buffer<float> sums_, tops_;  // [thread][so far, of a block][row]: sums and tops, totals
  Buffer<float> wide_;         // [thread][2][width]
  Buffer<uint8_t> scratch_;    // [thread]: an unpacked block
  Buffer<float> split_;        // sums of blocks that several threads share
  size_t split_rows_;
  std::unique_ptr<std::atomic<int>[]> left_;  // blocks that a tile and head still wait for
};

}  // namespace halo
