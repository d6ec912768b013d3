// The attention of a session: RoPE, the KV cache, and the weighted sum over it. Not the projections around it.
#pragma once
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
  Attention(const AttentionShape &shape, const Rope &rope, const AttentionKernels &kernels, Pool &pool);

  // Append `count` tokens to the cache of `layer` and attend. Row t of qkv, `qkv_row` floats apart, holds token t's
  // queries, keys and values (heads, kv_heads and kv_heads vectors of head_dim floats); row t of out gets its heads.
  // No two tokens may share slot and position, and those of a slot stand in rising order of position.
  void run(int layer, const float *qkv, int qkv_row, const int32_t *slots, const int32_t *positions, int count,
           float *out, int out_row);

  size_t bytes() const { return cache_.bytes(); }

 private:
  void rope_and_append(int layer, int t, const float *qkv, int slot, int position);
  void attend(int layer, int t, int head, int slot, int position, int thread, float *out);

  const AttentionShape shape_;
  const Rope rope_;
  const AttentionKernels &kernels_;
  Pool &pool_;
  const float scale_;
  KvCache cache_;
  const int q_row_;
  Buffer<float> rotated_, scores_, head_out_;
};

}  // namespace halo
