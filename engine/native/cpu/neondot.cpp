// The NEON path with the dot-product instructions (Armv8.2 FEAT_DotProd).
#include "kernels.h"

#if defined(__aarch64__)
#define HALO_DOTPROD 1
#include "neon.inc.h"

namespace halo {
extern const Kernels neondot_table = {"neondot", ternary, finish, rmsnorm, quantize, relu2, silu, dot_rows, coarse,
                                      coarse_bounds, &attention_kernels};
}  // namespace halo

#endif
