// AVX-512 with VNNI and VBMI.
#include "avx512.inc.h"

#if defined(__x86_64__)

namespace halo {

extern const Kernels avx512vbmi_table = {"avx512vbmi", ternary, finish, rmsnorm, quantize, relu2, silu, dot_rows, coarse,
                                     coarse_bounds, &attention_kernels};

}  // namespace halo

#endif
