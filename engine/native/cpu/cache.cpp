// Where a token's keys and values lie, and how they are written there. The order is told in attention_kernels.h.
#include "cache.h"

#include <string.h>

#include <string>

#include "model.h"

namespace halo {
namespace {

const char *const kNames[] = {"f32", "f16", "int8", "rotor3"};
const KvForm kDefault = KvForm::int8;
const int kGroupBytes = 192, kGroupCodes = 512;

// The sign of element i of a rotated vector: a bit of splitmix64's output number i.
float rotation_sign(uint64_t i) {
  uint64_t z = (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) >> 63 ? -1.0f : 1.0f;
}

bool can_rotate(int head_dim) { return head_dim >= 32 && head_dim <= 1024 && (head_dim & (head_dim - 1)) == 0; }

void put_bits(uint8_t *byte, int shift, int mask, int value) {
  *byte = (uint8_t)((*byte & ~(mask << shift)) | value << shift);
}

void put_code(uint8_t *packed, size_t index, int code) {
  uint8_t *group = packed + index / kGroupCodes * kGroupBytes;
  int k = (int)(index % kGroupCodes) / 64, i = (int)(index % 64);
  put_bits(group + 64 * (k / 4) + i, 2 * (k % 4), 3, code & 3);
  put_bits(group + 128 + i, k, 1, code >> 2);
}

size_t key_index(int position, int d) { return (size_t)d / 4 * 64 + position % 16 * 4 + d % 4; }

size_t value_index(int width, int position, int d) { return ((size_t)(position % 16 / 2) * width + d) * 2 + position % 2; }

}  // namespace

KvForm kv_form(const char *name) {
  if (!name) return kDefault;
  for (int form = 0; form < 4; ++form)
    if (!strcmp(name, kNames[form])) return (KvForm)form;
  throw Failure(HALO_INVALID, "'%.40s' is no form of the KV cache; there are f32, f16, int8 and rotor3", name);
}

const char *kv_name(KvForm form) { return kNames[(int)form]; }

static int checked_width(const AttentionShape &shape, KvForm form) {
  if (form == KvForm::rotor3 && !can_rotate(shape.head_dim))
    throw Failure(HALO_UNSUPPORTED, "the KV form rotor3 needs heads of 32, 64, 128 ... 1024 elements, not %d",
                  shape.head_dim);
  return round_up(shape.head_dim, 16);
}

KvCache::KvCache(const AttentionShape &shape, KvForm form, const AttentionKernels &kernels)
    : shape_(shape),
      form_(form),
      kernels_(kernels),
      width_(checked_width(shape, form)),
      room_(round_up(shape.context, 32)),
      signs_((size_t)width_),
      data_((size_t)shape.slots * shape.layers * shape.kv_heads * 2, (size_t)room_ / 16 * sixteen()),
      scales_(integers() ? (size_t)shape.slots * shape.layers * shape.kv_heads * 2 : 1, (size_t)room_) {
  for (int i = 0; i < width_; ++i) signs_[i] = rotation_sign((uint64_t)i);
}

size_t KvCache::sixteen() const {
  size_t elements = (size_t)16 * width_;
  if (form_ == KvForm::f32) return elements * 4;
  if (form_ == KvForm::f16) return elements * 2;
  return form_ == KvForm::int8 ? elements : elements / kGroupCodes * kGroupBytes;
}

void KvCache::append(int layer, int slot, int head_index, int position, float *k, float *v) {
  size_t at = head(layer, slot, head_index), half = room_ / 16 * sixteen();
  uint8_t *keys = &data_[2 * at * half] + position / 16 * sixteen(), *values = keys + half;
  float *scales = integers() ? &scales_[2 * at * room_] + position : nullptr;
  switch (form_) {
    case KvForm::f32: return append_floats(keys, values, position, k, v);
    case KvForm::f16: return append_halves(keys, values, position, k, v);
    case KvForm::int8: return append_int8(keys, values, position, scales, k, v);
    case KvForm::rotor3: return append_rotor3(keys, values, position, scales, k, v);
  }
}

void KvCache::append_floats(uint8_t *keys, uint8_t *values, int position, const float *k, const float *v) {
  float *key = (float *)keys + position % 16;
  for (int d = 0; d < shape_.head_dim; ++d) key[16 * d] = k[d];
  memcpy((float *)values + (size_t)(position % 16) * width_, v, (size_t)width_ * 4);
}

void KvCache::append_halves(uint8_t *keys, uint8_t *values, int position, const float *k, const float *v) {
  uint16_t halves[16], *key = (uint16_t *)keys + position % 16;
  for (int d = 0; d < width_; ++d) {
    if (d % 16 == 0) kernels_.to_half(k + d, 16, halves);
    key[16 * d] = halves[d % 16];
  }
  kernels_.to_half(v, width_, (uint16_t *)values + (size_t)(position % 16) * width_);
}

void KvCache::append_int8(uint8_t *keys, uint8_t *values, int position, float *scales, const float *k,
                          const float *v) {
  int8_t *codes = (int8_t *)k;  // scratch now: an element is read before its byte is written
  scales[0] = kernels_.to_int8(k, width_, codes);
  for (int d = 0; d < width_; ++d) keys[key_index(position, d)] = (uint8_t)(codes[d] + 128);
  codes = (int8_t *)v;
  scales[room_] = kernels_.to_int8(v, width_, codes);
  for (int d = 0; d < width_; ++d) values[value_index(width_, position, d)] = (uint8_t)codes[d];
}

void KvCache::append_rotor3(uint8_t *keys, uint8_t *values, int position, float *scales, float *k, float *v) {
  uint8_t codes[1024];
  rotate(k);
  scales[0] = kernels_.to_rotor3(k, width_, codes);
  for (int d = 0; d < width_; ++d) put_code(keys, key_index(position, d), codes[d]);
  rotate(v);
  scales[room_] = kernels_.to_rotor3(v, width_, codes);
  for (int d = 0; d < width_; ++d) put_code(values, value_index(width_, position, d), codes[d]);
}

void KvCache::block(int layer, int slot, int head_index, int block, int positions, uint8_t *scratch,
                    BlockRows *rows) const {
  static const int *const size = kRotorLevels;
  static const uint8_t key_levels[8] = {(uint8_t)(128 + size[0]), (uint8_t)(128 + size[1]), (uint8_t)(128 + size[2]),
                                        (uint8_t)(128 + size[3]), (uint8_t)(128 - size[0]), (uint8_t)(128 - size[1]),
                                        (uint8_t)(128 - size[2]), (uint8_t)(128 - size[3])};
  static const uint8_t value_levels[8] = {(uint8_t)size[0],  (uint8_t)size[1],  (uint8_t)size[2],  (uint8_t)size[3],
                                          (uint8_t)-size[0], (uint8_t)-size[1], (uint8_t)-size[2], (uint8_t)-size[3]};
  size_t at = head(layer, slot, head_index), half = room_ / 16 * sixteen();
  const uint8_t *keys = data_.get() + 2 * at * half + (size_t)block * (kBlockPositions / 16) * sixteen();
  rows->head_dim = shape_.head_dim;
  rows->width = width_;
  rows->keys = keys;
  rows->values = keys + half;
  if (integers()) {
    rows->key_scales = scales_.get() + 2 * at * room_ + (size_t)block * kBlockPositions;
    rows->value_scales = rows->key_scales + room_;
  }
  if (form_ != KvForm::rotor3) return;
  int groups = (positions + 15) / 16 * (16 * width_ / kGroupCodes);
  uint8_t *values = scratch + (size_t)kBlockPositions * width_;
  kernels_.unpack_rotor3(keys, groups, key_levels, scratch);
  kernels_.unpack_rotor3(keys + half, groups, value_levels, values);
  rows->keys = scratch;
  rows->values = values;
}

void KvCache::copy(int layer, int head_index, int from, int to, int length) {
  const size_t source = head(layer, from, head_index), target = head(layer, to, head_index);
  const size_t half = room_ / 16 * sixteen(), bytes = (size_t)(length + 15) / 16 * sixteen();  // 16 positions share bytes
  for (size_t part = 0; part < 2; ++part) {
    memcpy(&data_[(2 * target + part) * half], &data_[(2 * source + part) * half], bytes);
    if (integers())
      memcpy(&scales_[(2 * target + part) * room_], &scales_[(2 * source + part) * room_], (size_t)length * sizeof(float));
  }
}

void KvCache::rotate(float *x) const {
  for (int i = 0; i < width_; ++i) x[i] *= signs_[i];
  kernels_.hadamard(x, width_);
}

void KvCache::rotate_back(float *x) const {
  kernels_.hadamard(x, width_);
  for (int i = 0; i < width_; ++i) x[i] *= signs_[i];
}

}  // namespace halo
