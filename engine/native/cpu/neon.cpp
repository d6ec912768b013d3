// The NEON path that any aarch64 CPU can run: vmlal into int16 sums.
#include "kernels.h"

#if defined(__aarch64__)
#define HALO_DOTPROD 0
#include "neon.inc.h"

namespace halo {
extern const Kernels neon_table = {"neon", ternary, finish, rmsnorm, quantize, relu2, silu, dot_rows, coarse,
                                   coarse_bounds, &attention_kernels};
}  // namespace halo

#endif
