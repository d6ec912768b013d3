// Where a token's keys and values lie.
#include "cache.h"

#include <string.h>

#include "model.h"

namespace halo {

KvCache::KvCache(const AttentionShape &shape)
    : shape_(shape),
      width_(round_up(shape.head_dim, 16)),
      keys_((size_t)shape.slots * shape.layers * shape.kv_heads, (size_t)shape.context * width_),
      values_((size_t)shape.slots * shape.layers * shape.kv_heads, (size_t)shape.context * width_) {}

void KvCache::append(int layer, int slot, int head, int position, const float *k, const float *v) {
  size_t at = row(layer, slot, head) + (size_t)position * width_;
  memcpy(&keys_[at], k, (size_t)shape_.head_dim * 4);
  memcpy(&values_[at], v, (size_t)shape_.head_dim * 4);
}

}  // namespace halo
