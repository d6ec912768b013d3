// Attention over the KV cache, spread over the pool. No result depends on how a batch is cut or spread.
#include "attention.h"

#include <math.h>
#include <string.h>

#include "model.h"

namespace halo {
namespace {

// Rotate-half: element i turns with element i + head_dim / 2.
void rotate(const float *in, const float *cosine, const float *sine, int half, float *out) {
  for (int i = 0; i < half; ++i) {
    float a = in[i], b = in[i + half];
    out[i] = a * cosine[i] - b * sine[i];
    out[i + half] = b * cosine[i] + a * sine[i];
  }
}

}  // namespace

Attention::Attention(const AttentionShape &shape, const Rope &rope, const AttentionKernels &kernels, Pool &pool)
    : shape_(shape),
      rope_(rope),
      kernels_(kernels),
      pool_(pool),
      scale_((float)(1.0 / sqrt((double)shape.head_dim))),
      cache_(shape),
      q_row_((shape.heads + 1) * cache_.width()),
      rotated_(shape.chunk, q_row_),
      scores_(pool.threads(), round_up(shape.context, 16)),
      head_out_(pool.threads(), cache_.width()) {}

void Attention::run(int layer, const float *qkv, int qkv_row, const int32_t *slots, const int32_t *positions,
                    int count, float *out, int out_row) {
  pool_.each(count, [&](int t, int) { rope_and_append(layer, t, qkv + (size_t)t * qkv_row, slots[t], positions[t]); });
  pool_.each(count * shape_.heads, [&](int item, int thread) {
    int t = item / shape_.heads, head = item % shape_.heads;
    attend(layer, t, head, slots[t], positions[t], thread, out + (size_t)t * out_row + (size_t)head * shape_.head_dim);
  });
}

void Attention::rope_and_append(int layer, int t, const float *qkv, int slot, int position) {
  const float *cosine = rope_.cosine + (size_t)position * rope_.row;
  const float *sine = rope_.sine + (size_t)position * rope_.row;
  const float *k = qkv + (size_t)shape_.heads * shape_.head_dim, *v = k + (size_t)shape_.kv_heads * shape_.head_dim;
  float *turned = &rotated_[(size_t)t * q_row_];
  for (int head = 0; head < shape_.heads; ++head, turned += cache_.width())
    rotate(qkv + (size_t)head * shape_.head_dim, cosine, sine, shape_.head_dim / 2, turned);
  for (int head = 0; head < shape_.kv_heads; ++head, k += shape_.head_dim, v += shape_.head_dim) {
    rotate(k, cosine, sine, shape_.head_dim / 2, turned);
    cache_.append(layer, slot, head, position, turned, v);
  }
}

void Attention::attend(int layer, int t, int head, int slot, int position, int thread, float *out) {
  int kv_head = head / (shape_.heads / shape_.kv_heads), width = cache_.width();
  float *wide = &head_out_[(size_t)thread * width];
  kernels_.attend(&rotated_[(size_t)t * q_row_ + (size_t)head * width], cache_.keys(layer, slot, kv_head),
                  cache_.values(layer, slot, kv_head), position + 1, width, scale_,
                  &scores_[(size_t)thread * round_up(shape_.context, 16)], wide);
  memcpy(out, wide, (size_t)shape_.head_dim * 4);
}

}  // namespace halo
