// All device code of the engine, in one unit: what hipcc, nvcc or (simulated) a C++ compiler makes of it.
#include "kernels.h"

#include "attention.h"
#include "head_kernels.h"
#include "prefill_kernels.h"
#include "product.h"
#include "repack.h"
#include "step.h"

namespace halo {

size_t least_row_bytes(int n) { return one_bytes(n, (n + 319) / 320 * 320, 2, 0); }

size_t attention_bytes(int group, int width) { return attention_shared(group, width); }

void launch_embed(const EmbedArgs &args, int tokens, Stream &stream) {
  launch(halo_embed, {tokens}, kThreads, 0, stream, args);
}

void launch_publish(const PublishArgs &args, Stream &stream) { launch(halo_publish, {1}, kWave, 0, stream, args); }

void launch_norm(const NormArgs &args, int tokens, Stream &stream) {
  launch(halo_norm, {tokens}, kThreads, kScratchBytes + row_bytes_of(args.n), stream, args);
}

void launch_product(const ProductArgs &args, Packing packing, Stream &stream) {
  launch_product_kernel(args, packing, stream);
}

void launch_append(const AttentionArgs &args, KvStore form, Stream &stream) { launch_append_kernel(args, form, stream); }

void launch_attention(const AttentionArgs &args, KvStore form, Stream &stream) {
  launch_attention_kernel(args, form, stream);
}

void launch_repack(const RepackArgs &args, Packing packing, Stream &stream) { launch_repack_kernel(args, packing, stream); }

}  // namespace halo
