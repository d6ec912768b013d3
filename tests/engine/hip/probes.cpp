// Small kernels that each use one thing of gfx1151, so that the emulator itself can be tested. Not part of the engine.
#include <hip/hip_runtime.h>
#include <stdint.h>

struct Probe {
  const void *a, *b, *c;
  void *out;
  int n;
};

typedef int Four __attribute__((ext_vector_type(4)));
typedef int Eight __attribute__((ext_vector_type(8)));

#define PROBE(name) extern "C" __global__ void probe_##name(Probe p)
#define AT (blockIdx.x * blockDim.x + threadIdx.x)
#define IN(type, member) (((const type *)p.member)[AT])
#define OUT(type) (((type *)p.out)[AT])
#define MOVED(x, control) __builtin_amdgcn_update_dpp(0, x, control, 0xf, 0xf, true)

// What lanes exchange: every form adds what came to what was there, in the same register.
PROBE(shuffle_xor) { int v = IN(int, a); OUT(int) = v + 64 * __shfl_xor(v, 16); }
PROBE(shuffle_down) { int v = IN(int, a); OUT(int) = v + 64 * __shfl_down(v, 3); }
PROBE(row_xmask) { int v = IN(int, a); OUT(int) = v + MOVED(v, 0x168); }
PROBE(row_ror) { int v = IN(int, a); OUT(int) = v + MOVED(v, 0x123); }
PROBE(row_shl) { int v = IN(int, a); OUT(int) = v + MOVED(v, 0x104); }
PROBE(row_share) { int v = IN(int, a); OUT(int) = v + MOVED(v, 0x153); }
PROBE(row_mirror) { int v = IN(int, a); OUT(int) = 64 * MOVED(v, 0x140) + MOVED(v, 0x141); }  // one of them in VOP3
PROBE(quad) { int v = IN(int, a); OUT(int) = v + MOVED(v, 0x4e); }
PROBE(dpp8) { int v = IN(int, a); OUT(int) = v + __builtin_amdgcn_mov_dpp8(v, 0x53977); }
PROBE(permlanex16) {
  int v = IN(int, a);
  OUT(int) = v + 64 * (int)__builtin_amdgcn_permlanex16(v, v, 0x76543210, 0xfedcba98, true, false);
}
PROBE(swizzle) { int v = IN(int, a); OUT(int) = v + 64 * __builtin_amdgcn_ds_swizzle(v, 0x401f); }

// Floats.
PROBE(fma) { OUT(float) = fmaf(IN(float, a), IN(float, b), IN(float, c)); }
PROBE(multiply_add) { float x = IN(float, a) * IN(float, b); OUT(float) = x + IN(float, c); }
PROBE(divide) { OUT(float) = IN(float, a) / IN(float, b); }
PROBE(root) { OUT(float) = sqrtf(IN(float, a)); }
PROBE(nearest) { OUT(float) = rintf(IN(float, a)); }

// Whole numbers.
PROBE(dot4) { OUT(int) = __builtin_amdgcn_sudot4(false, IN(int, a), true, IN(int, b), IN(int, c), false); }
PROBE(wmma) {
  Eight sums = IN(Eight, c);
  for (int i = 0; i < p.n; ++i) sums = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, IN(Four, a), true, IN(Four, b), sums, false);
  OUT(Eight) = sums;
}

// Memory.
PROBE(tree) {
  extern __shared__ int shared[];
  const int t = threadIdx.x;
  shared[t] = IN(int, a);
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (t < half) shared[t] += shared[t + half];
    __syncthreads();
  }
  if (t == 0) ((int *)p.out)[blockIdx.x] = shared[0];
}
PROBE(last_block) {
  extern __shared__ int shared[];
  int *out = (int *)p.out, t = threadIdx.x;
  atomicAdd(&out[1 + t], IN(int, a));
  __threadfence();
  __syncthreads();
  if (t == 0) shared[0] = atomicAdd(&out[0], 1);
  __syncthreads();
  if (shared[0] + 1 == (int)gridDim.x) out[1 + blockDim.x + t] = 2 * __atomic_load_n(&out[1 + t], __ATOMIC_RELAXED);
}
PROBE(race) {
  extern __shared__ int shared[];
  shared[threadIdx.x] = IN(int, a);
  OUT(int) = shared[(threadIdx.x + 40) % blockDim.x];
}
PROBE(past_the_end) { OUT(int) = ((const int *)p.a)[AT + 1]; }
PROBE(in_order) { if (AT == 0) *(int *)p.out = 0; else *(int *)p.out = blockIdx.x; }
PROBE(uninitialised) {
  extern __shared__ float floats[];
  OUT(float) = floats[threadIdx.x];
}
PROBE(scratch) {
  int own[40];
  for (int i = 0; i < 40; ++i) own[i] = ((const int *)p.a)[i] * AT;
  OUT(int) = own[((const int *)p.a)[AT] % 40];
}
PROBE(half_a_matrix) {
  if (threadIdx.x < 16) OUT(Eight) = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, IN(Four, a), true, IN(Four, b), IN(Eight, c), false);
}
