// What a step has besides products, attention and head: the embedding's rows, rows to int8 where several tokens share
// them, and the results to the host. Device code.
#pragma once
#include "arithmetic.h"
#include "kernels.h"
#include "launch.h"

namespace halo {

// A block each for every row of int8: what several tokens need, and prefill.
GPU_KERNEL(kThreads) halo_norm(NormArgs a) {
  let_next_start();
  wait_for_previous();
  const int token = block_id();
  uint8_t *shared = shared_memory();
  RowFacts facts =
      quantized_row<kThreads>(a.x + (size_t)token * a.x_stride, a.norm, a.n, a.eps, a.padded,
                              (float *)(shared + kScratchBytes), a.out.q + (size_t)token * a.out.stride, (uint32_t *)shared);
  if (thread_id() == 0) {
    a.out.scale[token] = facts.scale;
    a.out.sum[token] = facts.sum;
    if (!facts.finite) atomic_or(a.status, kNotFinite);
  }
}

GPU_KERNEL(kThreads) halo_embed(EmbedArgs a) {
  let_next_start();
  wait_for_previous();
  const int token = block_id();
  const uint8_t *from = a.rows + (size_t)a.in.tokens[token] * a.row_bytes;
  if (thread_id() == 0) {
    a.slots[token] = a.in.slots[token];
    a.positions[token] = a.in.positions[token];
  }
  const size_t position = (size_t)a.in.positions[token] * a.rope_row;
  for (int i = thread_id(); i < 2 * a.rope_row; i += kThreads)
    a.rope_now[(size_t)token * 2 * a.rope_row + i] =
        i < a.rope_row ? a.rope_cos[position + i] : a.rope_sin[position + i - a.rope_row];
  float *x = a.x + (size_t)token * a.stride;
  for (int i = thread_id(); i < a.stride; i += kThreads)
    x[i] = i >= a.hidden ? 0.0f : a.bf16 ? float_of((uint32_t)((const uint16_t *)from)[i] << 16) : ((const float *)from)[i];
}

GPU_KERNEL(kWave) halo_publish(PublishArgs a) {
  let_next_start();
  wait_for_previous();
  for (int i = thread_id(); i < a.count; i += kWave) a.host_ids[i] = a.ids[i];
  if (thread_id() == 0) {
    *a.host_status = *a.status;
    *a.status = 0;
  }
}

}  // namespace halo
