// The NEON path with the dot-product instructions (Armv8.2 FEAT_DotProd).
#include "kernels.h"

#if defined(__aarch64__)
#define HALO_DOTPROD 1
#include "neon.inc.h"

namespace halo {
extern const Kernels neondot_table = {"neondot", ternary<4, 4>, rmsnorm, quantize, relu2, dot_rows, &attention_kernels};
}  // namespace halo

#endif
