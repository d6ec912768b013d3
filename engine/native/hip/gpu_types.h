// uint4 where no device compiler brings it: for host files that see the kernels' arguments.
#pragma once
#include <stdint.h>

#if defined(HALO_SIM)
#include "sim.h"
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#else
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
#endif
