// What differs between the targets of the device code, and nothing else: HIP (gfx1151), CUDA (to run and measure where no
// such GPU stands) and SIM (the device simulated on the CPU, so that a machine without any GPU runs every kernel).
//
// A kernel takes one struct by value, is launched with one-dimensional blocks, has 32 lanes to a wave on every target,
// and takes its shared memory from shared_memory(). Nothing is fused or reordered that is not written so: the compiler's
// contraction is off, and fused operations are __builtin_fmaf or fused().
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(HALO_SIM)
#include "sim.h"
#elif defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <cuda_runtime.h>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "halo: the CUDA library needs sm_90 or newer, for its copies to shared memory: set HALO_CUDA_TARGETS"
#endif
#endif

// GPU_KERNEL_TWO: with registers for two blocks a multiprocessor, so that the next kernel's fit in beside this one's.
#if defined(HALO_SIM)
#define GPU_KERNEL(threads) extern "C" void
#define GPU_KERNEL_TWO(threads) extern "C" void
#define GPU_DEVICE static inline
#define GPU_HOST_DEVICE static inline
#define GPU_UNROLL
#define GPU_NO_UNROLL
#elif defined(__HIP__)
#define GPU_KERNEL(threads) extern "C" __global__ __launch_bounds__(threads) void
#define GPU_KERNEL_TWO(threads) extern "C" __global__ __launch_bounds__(threads) void
#define GPU_DEVICE static __device__ __forceinline__
#define GPU_HOST_DEVICE static __host__ __device__ __forceinline__
#define GPU_UNROLL _Pragma("unroll")
#define GPU_NO_UNROLL _Pragma("unroll 1")
#else
#define GPU_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define GPU_KERNEL_TWO(threads) extern "C" __global__ void __launch_bounds__(threads, 2)
#define GPU_DEVICE static __device__ __forceinline__
#define GPU_HOST_DEVICE static __host__ __device__ __forceinline__
#define GPU_UNROLL _Pragma("unroll")
#define GPU_NO_UNROLL _Pragma("unroll 1")
#endif

namespace halo {

const int kWave = 32;

// Shared memory in which a block may hold weights that are on their way, where the hardware copies by itself.
#if defined(HALO_SIM)
const int kStagedBytes = 4 << 10;
#elif defined(__HIP__)
const int kStagedBytes = 0;
#else
const int kStagedBytes = 80 << 10;
#endif

#if defined(HALO_SIM)

GPU_DEVICE int thread_id() { return sim::thread(); }
GPU_DEVICE int block_id() { return sim::block(0); }
GPU_DEVICE int block_y() { return sim::block(1); }
GPU_DEVICE int block_z() { return sim::block(2); }
GPU_DEVICE int block_count() { return sim::blocks(); }
GPU_DEVICE uint8_t *shared_memory() { return sim::shared(); }
GPU_DEVICE void sync_block() { sim::sync_block(); }
GPU_DEVICE void sync_wave() { sim::sync_wave(); }
GPU_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return sim::exchange(x, (thread_id() % kWave) ^ mask); }
GPU_DEVICE uint32_t shuffle(uint32_t x, int lane) { return sim::exchange(x, lane); }
GPU_DEVICE void begin_staging(uint64_t *) {}
GPU_DEVICE void expect_staged(uint64_t *, int) {}
GPU_DEVICE void stage(uint64_t *, void *shared, const void *p, int bytes) { __builtin_memcpy(shared, p, (size_t)bytes); }
GPU_DEVICE void wait_staged(uint64_t *, int) {}
GPU_DEVICE void fence() {}
GPU_DEVICE void wait_for_previous() {}
GPU_DEVICE void let_next_start() {}
GPU_DEVICE int atomic_add(int *p, int x) { return (*p += x) - x; }
GPU_DEVICE uint32_t atomic_or(uint32_t *p, uint32_t x) { uint32_t was = *p; *p |= x; return was; }
GPU_DEVICE uint32_t atomic_and(uint32_t *p, uint32_t x) { uint32_t was = *p; *p &= x; return was; }
GPU_DEVICE uint32_t atomic_max(uint32_t *p, uint32_t x) { uint32_t was = *p; *p = x > was ? x : was; return was; }
GPU_DEVICE uint64_t atomic_max(uint64_t *p, uint64_t x) { uint64_t was = *p; *p = x > was ? x : was; return was; }
GPU_DEVICE uint4 load_once(const uint4 *p) { return *p; }
GPU_DEVICE void fetch_ahead(const void *) {}
GPU_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GPU_DEVICE float root(float x) { return __builtin_sqrtf(x); }
GPU_DEVICE float nearest(float x) { return __builtin_nearbyintf(x); }
GPU_DEVICE uint32_t bits_of(float x) { uint32_t u; __builtin_memcpy(&u, &x, 4); return u; }
GPU_DEVICE float float_of(uint32_t u) { float x; __builtin_memcpy(&x, &u, 4); return x; }
// acc + the four bytes of w (unsigned) times those of x (signed); and both signed.
GPU_DEVICE int dot4_us(uint32_t w, uint32_t x, int acc) {
  for (int b = 0; b < 32; b += 8) acc += (int)(w >> b & 255) * (int8_t)(x >> b);
  return acc;
}
GPU_DEVICE int dot4_ss(uint32_t w, uint32_t x, int acc) {
  for (int b = 0; b < 32; b += 8) acc += (int8_t)(w >> b) * (int8_t)(x >> b);
  return acc;
}
// Byte i of the result is byte (selector byte i, 0 to 7) of the eight bytes low, high.
GPU_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t all = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int b = 0; b < 32; b += 8) result |= (uint32_t)(all >> 8 * (selector >> b & 7) & 255) << b;
  return result;
}

#else

GPU_DEVICE int thread_id() { return (int)threadIdx.x; }
GPU_DEVICE int block_id() { return (int)blockIdx.x; }
GPU_DEVICE int block_y() { return (int)blockIdx.y; }
GPU_DEVICE int block_z() { return (int)blockIdx.z; }
GPU_DEVICE int block_count() { return (int)gridDim.x; }
GPU_DEVICE uint8_t *shared_memory() {
  extern __shared__ __align__(16) uint8_t shared_bytes[];
  return shared_bytes;
}
GPU_DEVICE void sync_block() { __syncthreads(); }
GPU_DEVICE void fence() { __threadfence(); }
GPU_DEVICE int atomic_add(int *p, int x) { return atomicAdd(p, x); }
GPU_DEVICE uint32_t atomic_or(uint32_t *p, uint32_t x) { return atomicOr(p, x); }
GPU_DEVICE uint32_t atomic_and(uint32_t *p, uint32_t x) { return atomicAnd(p, x); }
GPU_DEVICE uint32_t atomic_max(uint32_t *p, uint32_t x) { return atomicMax(p, x); }
GPU_DEVICE uint64_t atomic_max(uint64_t *p, uint64_t x) {
  return atomicMax((unsigned long long *)p, (unsigned long long)x);
}
GPU_DEVICE float root(float x) { return sqrtf(x); }
GPU_DEVICE float nearest(float x) { return rintf(x); }
GPU_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
GPU_DEVICE float float_of(uint32_t u) { return __uint_as_float(u); }

#if defined(__HIP__)

GPU_DEVICE void sync_wave() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}
GPU_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return (uint32_t)__shfl_xor((int)x, mask, kWave); }
GPU_DEVICE uint32_t shuffle(uint32_t x, int lane) { return (uint32_t)__shfl((int)x, lane, kWave); }
// There is no copy to shared memory that goes on beside the waves: nothing is staged here (kStagedBytes).
GPU_DEVICE void begin_staging(uint64_t *) {}
GPU_DEVICE void expect_staged(uint64_t *, int) {}
GPU_DEVICE void stage(uint64_t *, void *, const void *, int) {}
GPU_DEVICE void wait_staged(uint64_t *, int) {}
GPU_DEVICE void wait_for_previous() {}
GPU_DEVICE void let_next_start() {}
// What is read once a token: it need not push anything out of the caches.
GPU_DEVICE uint4 load_once(const uint4 *p) {
  typedef uint32_t Four __attribute__((ext_vector_type(4)));
  Four v = __builtin_nontemporal_load((const Four *)p);
  return make_uint4(v.x, v.y, v.z, v.w);
}
GPU_DEVICE void fetch_ahead(const void *) {}  // there is no such instruction; the misses are covered by the weights' own time
GPU_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GPU_DEVICE int dot4_us(uint32_t w, uint32_t x, int acc) {
  return __builtin_amdgcn_sudot4(false, (int)w, true, (int)x, acc, false);
}
GPU_DEVICE int dot4_ss(uint32_t w, uint32_t x, int acc) {
  return __builtin_amdgcn_sudot4(true, (int)w, true, (int)x, acc, false);
}
GPU_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __builtin_amdgcn_perm(high, low, selector);
}

#else

GPU_DEVICE void sync_wave() { __syncwarp(); }
GPU_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
GPU_DEVICE uint32_t shuffle(uint32_t x, int lane) { return __shfl_sync(~0u, x, lane); }
GPU_DEVICE uint32_t wave_max(uint32_t x) { return __reduce_max_sync(~0u, x); }
GPU_DEVICE int wave_sum(int x) { return __reduce_add_sync(~0u, x); }
GPU_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Copies to shared memory by the hardware's own engine, beside the waves' loads and not in front of them. `staging`
// (shared) counts their bytes: one thread makes it, says how many bytes will come, and asks for them (16 at a time); all
// may wait. Its turns are numbered: the first is 0, and only the last but one and the last can be told apart.
GPU_DEVICE void begin_staging(uint64_t *staging) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(staging)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
GPU_DEVICE void expect_staged(uint64_t *staging, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(staging)), "r"(bytes) : "memory");
}
GPU_DEVICE void stage(uint64_t *staging, void *shared, const void *p, int bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(p), "r"(bytes), "r"(shared_address(staging))
               : "memory");
}
GPU_DEVICE void wait_staged(uint64_t *staging, int turn) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(staging)), "r"(turn & 1)
                 : "memory");
}
// The next kernel may start while this one runs: what it does before wait_for_previous() must not need this one's results.
GPU_DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
GPU_DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
GPU_DEVICE uint4 load_once(const uint4 *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// Into the cache that all multiprocessors share: what is needed after wait_for_previous() and does not depend on it.
GPU_DEVICE void fetch_ahead(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
GPU_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GPU_DEVICE int dot4_us(uint32_t w, uint32_t x, int acc) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(w), "r"(x), "r"(acc));
  return result;
}
GPU_DEVICE int dot4_ss(uint32_t w, uint32_t x, int acc) { return __dp4a((int)w, (int)x, acc); }
GPU_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t pairs = (selector | selector >> 4) & 0x00ff00ffu;  // the hardware's selector has four bits a byte
  return __byte_perm(low, high, (pairs | pairs >> 8) & 0xffffu);
}

#endif
#endif

#if defined(HALO_SIM) || defined(__HIP__)  // the others have an instruction for it
GPU_DEVICE uint32_t wave_max(uint32_t x) {
  for (int half = 16; half; half /= 2) {
    const uint32_t other = shuffle_xor(x, half);
    x = other > x ? other : x;
  }
  return x;
}
GPU_DEVICE int wave_sum(int x) {
  for (int half = 16; half; half /= 2) x += (int)shuffle_xor((uint32_t)x, half);
  return x;
}
#endif

GPU_DEVICE float shuffle_xor(float x, int mask) { return float_of(shuffle_xor(bits_of(x), mask)); }
GPU_DEVICE int shuffle_xor(int x, int mask) { return (int)shuffle_xor((uint32_t)x, mask); }
#if defined(__HIP__) && !defined(HALO_SIM)
// The same for all lanes, and the compiler is told so: what depends on it alone needs no mask.
GPU_DEVICE int wave_id() { return __builtin_amdgcn_readfirstlane(thread_id() / kWave); }
#else
GPU_DEVICE int wave_id() { return thread_id() / kWave; }
#endif
GPU_DEVICE int lane_id() { return thread_id() % kWave; }

}  // namespace halo
