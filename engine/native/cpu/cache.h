// The KV cache: owns the memory of a session's keys and values and knows their form. Not what is done with them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "attention_kernels.h"
#include "buffer.h"

namespace halo {

enum class KvForm { f32, f16, int8, rotor3 };

// The form of a name; NULL is the default. Throws Failure for a name that is none.
KvForm kv_form(const char *name);
const char *kv_name(KvForm form);

// The sizes that the cache and the attention of one session go by.
struct AttentionShape {
  int layers, heads, kv_heads, head_dim;
  int slots, context;  // sequences, and tokens of each
  int chunk;           // tokens that one call of Attention::run takes at most
};

class KvCache {
 public:
  // Throws Failure where the form cannot hold vectors of this head_dim.
  KvCache(const AttentionShape &shape, KvForm form, const AttentionKernels &kernels);

  // Write one token's key (rotated by its position) and value of one KV head: width() floats each, zero beyond
  // head_dim. Both are scratch afterwards. Tokens of one sequence and 16 positions may share bytes: one thread's work.
  void append(int layer, int slot, int head, int position, float *k, float *v);

  // Copy one KV head of a slot's first `length` positions to another slot.
  void copy(int layer, int head, int from, int to, int length);

  // Point `rows` to positions 256 * block and on of a KV head. The packed form is unpacked for `positions` of them to
  // `scratch`, of scratch_bytes().
  void block(int layer, int slot, int head, int block, int positions, uint8_t *scratch, BlockRows *rows) const;

  size_t block_bytes() const { return kBlockPositions / 16 * sixteen(); }  // of its keys, and of its values

  // Rotate a vector of width() elements as the keys and values are, and back (both times sqrt(head_dim) too long).
  void rotate(float *x) const;
  void rotate_back(float *x) const;

  KvForm form() const { return form_; }
  bool integers() const { return form_ == KvForm::int8 || form_ == KvForm::rotor3; }
  int width() const { return width_; }  // head_dim filled up to the lanes
  size_t scratch_bytes() const { return form_ == KvForm::rotor3 ? (size_t)2 * kBlockPositions * width_ : 64; }
  size_t bytes() const { return data_.bytes() + (integers() ? scales_.bytes() : 0); }

 private:
  size_t head(int layer, int slot, int head) const {
    return ((size_t)slot * shape_.layers + layer) * shape_.kv_heads + head;
  }
  size_t sixteen() const;  // bytes of 16 positions of keys, or of values
  void append_floats(uint8_t *keys, uint8_t *values, int position, const float *k, const float *v);
  void append_halves(uint8_t *keys, uint8_t *values, int position, const float *k, const float *v);
  void append_int8(uint8_t *keys, uint8_t *values, int position, float *scales, const float *k, const float *v);
  void append_rotor3(uint8_t *keys, uint8_t *values, int position, float *scales, float *k, float *v);

  const AttentionShape shape_;
  const KvForm form_;
  const AttentionKernels &kernels_;
  const int width_, room_;       // room_: context filled up to the positions of a step
  std::vector<float> signs_;     // of the rotation
  Buffer<uint8_t> data_;         // [slot][layer][kv head][keys, values]
  Buffer<float> scales_;         // [slot][layer][kv head][keys, values][room_]
};

}  // namespace halo
