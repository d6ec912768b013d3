// Putting a kernel on a stream, for the files that hold device code.
#pragma once
#include "../cpu/failure.h"
#include "gpu.h"
#include "runtime.h"

namespace halo {

struct Grid {
  int x, y = 1, z = 1;
};

#if defined(HALO_SIM)

void sim_enqueue(Stream &stream, std::function<void()> work);  // runs it now, or adds it to the graph that is captured

template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, size_t shared, Stream &stream, const Args &args) {
  sim_enqueue(stream, [=] { sim::launch([&] { kernel(args); }, {grid.x, grid.y, grid.z}, threads, shared); });
}

#elif defined(__HIP__)

[[noreturn]] void throw_device_error(int error, const char *what);

template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, size_t shared, Stream &stream, const Args &args) {
  void *values[] = {(void *)&args};
  hipError_t error = hipLaunchKernel((const void *)kernel, dim3(grid.x, grid.y, grid.z), dim3(threads), values, shared,
                                     (hipStream_t)stream.handle());
  if (error != hipSuccess) throw_device_error((int)error, "a kernel cannot be launched");
}

#else

[[noreturn]] void throw_device_error(int error, const char *what);

// A kernel may start before the one in front of it has ended: it waits in wait_for_previous() for that one's results.
template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, size_t shared, Stream &stream, const Args &args) {
  cudaError_t error = cudaSuccess;
  if (shared > 48 << 10)
    error = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  // One division of a multiprocessor's memory for all kernels: to change it, it would have to run empty between two.
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)stream.handle();
  config.attrs = &early;
  config.numAttrs = 1;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args);
  if (error != cudaSuccess) throw_device_error((int)error, "a kernel cannot be launched");
}

#endif

}  // namespace halo
