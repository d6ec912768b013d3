// AVX-512 with VNNI.
#include "avx512.inc.h"

#if defined(__x86_64__)

namespace halo {

extern const Kernels avx512_table = {"avx512", ternary, finish, rmsnorm, quantize, relu2, silu, dot_rows, coarse,
                                     coarse_bounds, &attention_kernels};

}  // namespace halo

#endif
