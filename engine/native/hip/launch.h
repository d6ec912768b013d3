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

inline void launch_with(const void *kernel, const cudaLaunchConfig_t &config, void **values) {
  cudaError_t error = cudaSuccess;
  if (config.dynamicSmemBytes > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)config.dynamicSmemBytes);
  // One division of a multiprocessor's memory for all kernels: to change it, it would have to run empty between two.
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, kernel, values);
  if (error != cudaSuccess) throw_device_error((int)error, "a kernel cannot be launched");
}

inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, size_t shared, Stream &stream, cudaLaunchAttribute *how) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)stream.handle();
  config.attrs = how;
  config.numAttrs = 1;
  return config;
}

// A kernel may start before the one in front of it has ended: it waits in wait_for_previous() for that one's results.
template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, size_t shared, Stream &stream, const Args &args) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  void *values[] = {(void *)&args};
  launch_with((const void *)kernel, launch_config(dim3(grid.x, grid.y, grid.z), threads, shared, stream, &early), values);
}

#endif

}  // namespace halo
