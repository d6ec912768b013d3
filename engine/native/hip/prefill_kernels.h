// Prefill on the device, put together: products (prefill_gemm.h) and attention (prefill_attention.h, prefill_floats.h).
// Device code.
#pragma once
#include "prefill_attention.h"
#include "prefill_floats.h"
#include "prefill_gemm.h"

namespace halo {

void launch_gemm(const GemmArgs &args, Packing packing, Stream &stream) {
  prefill::launch_gemm_kernel(args, packing, device().multiprocessors, -1, stream);
}

void launch_prefill_attention(const PrefillAttentionArgs &args, KvStore form, Stream &stream) {
  if (args.tile_count == 0) return;
  if (args.base.kv.width > kMostPrefillWidth)
    throw Failure(HALO_UNSUPPORTED, "prefill on the device takes heads of at most %d elements, not %d", kMostPrefillWidth,
                  args.base.kv.head_dim);
  if (form == KvStore::f16)
    prefill::launch_float_attention(args, stream);
  else
    prefill::launch_integer_attention(args, form, stream);
}

}  // namespace halo
