// The KV cache: owns the memory of a session's keys and values. It knows their form, and not what is done with them.
#pragma once
#include <stddef.h>

#include "buffer.h"

namespace halo {

// The sizes that the cache and the attention of one session go by.
struct AttentionShape {
  int layers, heads, kv_heads, head_dim;
  int slots, context;  // sequences, and tokens of each
  int chunk;           // tokens that one call of Attention::run takes at most
};

class KvCache {
 public:
  explicit KvCache(const AttentionShape &shape);

  // Write one token's key (rotated by its position) and value of one KV head, head_dim floats each.
  void append(int layer, int slot, int head, int position, const float *k, const float *v);

  // The rows of one KV head of one sequence: [context][width()] floats.
  const float *keys(int layer, int slot, int head) { return keys_.get() + row(layer, slot, head); }
  const float *values(int layer, int slot, int head) { return values_.get() + row(layer, slot, head); }

  int width() const { return width_; }
  size_t bytes() const { return keys_.bytes() + values_.bytes(); }

 private:
  size_t row(int layer, int slot, int head) const {
    return (((size_t)slot * shape_.layers + layer) * shape_.kv_heads + head) * shape_.context * width_;
  }

  const AttentionShape shape_;
  const int width_;              // head_dim filled up to the lanes
  Buffer<float> keys_, values_;  // [slot][layer][kv head][context][width]
};

}  // namespace halo
