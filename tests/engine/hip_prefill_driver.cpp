// For test_hip_prefill.py: the prefill kernels on the simulated device, over arrays of the test. Not a program of halo.
#include <string.h>

#include <string>

#include "hip/prefill_kernels.h"

namespace {

using namespace halo;

std::string message;

template <class F>
int guarded(F f) {
  try {
    f();
    return HALO_OK;
  } catch (const Failure &failure) {
    message = failure.message;
    return failure.status;
  }
}

}  // namespace

extern "C" {

const char *driver_message() { return message.c_str(); }

// ints: rows, tile_count, steps, stride, tokens, out_stride, epilogue, activation, packing, forced shape (-1: none; -2:
// as launch_gemm does).
int driver_gemm(const uint8_t *tiles, const float *weight_scale, int8_t *q, float *scale, int32_t *sum, float *out,
                const int32_t *ints) {
  GemmArgs a = {tiles,   weight_scale, ints[0], ints[1], ints[2], {q, scale, sum, ints[3]}, ints[4], ints[5],
                ints[6], ints[7],      out};
  return guarded([&] {
    Stream stream;
    if (ints[9] == -2)
      launch_gemm(a, (Packing)ints[8], stream);
    else
      prefill::launch_gemm_kernel(a, (Packing)ints[8], 132, ints[9], stream);
    stream.sync();
  });
}

// ints: qkv_stride, tokens, layer, heads, kv_heads, head_dim, width, room, layers, rope_row, out_stride, form.
int driver_attention(const float *qkv, const int32_t *slots, const int32_t *positions, uint8_t *data, float *scales,
                     size_t half, const float *cosine, const float *sine, float scale, float *out, uint32_t *status,
                     const int32_t *ints) {
  PrefillAttentionArgs a = {};
  a.base.qkv = qkv;
  a.base.qkv_stride = ints[0];
  a.base.tokens = ints[1];
  a.base.layer = ints[2];
  a.base.heads = ints[3];
  a.base.kv = {data, scales, half, ints[8], ints[4], ints[5], ints[6], ints[7]};
  a.base.rope_cos = cosine;
  a.base.rope_sin = sine;
  a.base.rope_row = ints[9];
  a.base.scale = scale;
  a.base.out = out;
  a.base.out_stride = ints[10];
  a.base.status = status;
  return guarded([&] {
    Stream stream;
    std::vector<PrefillTile> tiles = plan_prefill(slots, positions, ints[1], ints[3] / ints[4]);
    a.tiles = tiles.data();
    a.tile_count = (int)tiles.size();
    launch_prefill_attention(a, (KvStore)ints[11], stream);
    stream.sync();
  });
}

// The tiles of a batch: [count][4], as many as there is room for; how many there are.
int driver_plan(const int32_t *slots, const int32_t *positions, int count, int group, int32_t *out, int room) {
  std::vector<PrefillTile> tiles = plan_prefill(slots, positions, count, group);
  memcpy(out, tiles.data(), sizeof(PrefillTile) * std::min((size_t)room, tiles.size()));
  return (int)tiles.size();
}

}  // extern "C"
