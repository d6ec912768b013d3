// The matrix units: products of int8, summed exactly in int32, for a wave. A thin header over gfx11's WMMA, NVIDIA's
// mma.sync (sm_80 and later) and, in the simulation, WMMA's registers spelled out, or mma.sync's where
// HALO_SIM_MMA_SYNC is defined. Not a matrix product of any size.
//
// All targets multiply 16 x 16 results at once from operands of 16 bytes a row; what differs is which lane holds what.
//
// WMMA (v_wmma_i32_16x16x16_iu8, wave32; AMD's RDNA 3.5 ISA guide, 7.9): lane l holds row l % 16 of A, column l % 16 of
// B, sixteen bytes along k each, lanes 16 to 31 the same as lanes 0 to 15. Register v of the result is row
// 2 v + l / 16, column l % 16. The signs of A and B are flags.
// mma.sync.m16n8k32 (PTX ISA, "Matrix fragments for mma.m16n8k32"): with g = l / 4 and t = l % 4, words 0 and 2 of A are
// row g, k = 4 t and 16 + 4 t, words 1 and 3 the same of row g + 8; words 0 and 1 of B are column g, k = 4 t and
// 16 + 4 t; results 0 and 1 are row g, columns 2 t and 2 t + 1, results 2 and 3 the same of row g + 8. Either operand
// may be unsigned.
//
// The order along k is nobody's business as long as both operands have the same one.
#pragma once
#include "gpu.h"

#if defined(HALO_SIM_MMA_SYNC) || (!defined(HALO_SIM) && !defined(__HIP__))
#define HALO_MMA_SYNC 1
#endif
#if defined(HALO_SIM_MMA_SYNC)
#include <functional>
#include <vector>
#endif
#if defined(HALO_SIM)
#define HALO_MMA_LOOP
#else
#define HALO_MMA_LOOP _Pragma("unroll 1")
#endif

namespace halo {
namespace mma {

// x, of which the compiler knows nothing more: what follows from it is computed where it is used, and not kept in a
// register from before the loop.
GPU_DEVICE int fresh(int x) {
#if defined(__HIP__)
  asm volatile("" : "+v"(x));
#elif defined(HALO_MMA_SYNC)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The block meets, and sees what was written to shared memory. On gfx11 sync_block(), and the compiler's own barrier
// behind any fence, would wait for the loads from global memory as well, which here are meant to be on their way.
GPU_DEVICE void sync_shared() {
#if defined(__HIP__)
  asm volatile("s_waitcnt lgkmcnt(0)\n\ts_barrier" ::: "memory");
#else
  sync_block();
#endif
}

// Loads from above stay above: the compiler of gfx11 would put some off until their results are wanted.
GPU_DEVICE void keep_order() {
#if defined(__HIP__)
  asm volatile("" ::: "memory");
#endif
}

// The wave's number in its block, as a scalar.
GPU_DEVICE int own_wave() {
#if defined(__HIP__)
  return __builtin_amdgcn_readfirstlane(wave_id());
#else
  return wave_id();
#endif
}

#if defined(HALO_SIM_MMA_SYNC)

struct Two {
  float x, y;
};

template <bool kSignedA>
GPU_DEVICE void multiply8(int *acc, const uint32_t *a, uint32_t b0, uint32_t b1) {
  static uint32_t left[32][kWave][4], right[32][kWave][2];
  const int lane = lane_id(), wave = wave_id(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) left[wave][lane][i] = a[i];
  right[wave][lane][0] = b0, right[wave][lane][1] = b1;
  sync_wave();
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 32; ++k) {
      const uint32_t x = left[wave][g * 4 + k % 16 / 4][k / 16 * 2 + i / 2] >> 8 * (k % 4) & 255;
      const uint32_t y = right[wave][(2 * t + i % 2) * 4 + k % 16 / 4][k / 16] >> 8 * (k % 4) & 255;
      acc[i] += (kSignedA ? (int8_t)x : (int)x) * (int8_t)y;
    }
  sync_wave();
}

GPU_DEVICE void load_matrices(uint32_t *w, const uint8_t *row) {
  static const uint8_t *rows[32][kWave];
  const int lane = lane_id(), wave = wave_id();
  rows[wave][lane] = row;
  sync_wave();
  for (int i = 0; i < 4; ++i) w[i] = *(const uint32_t *)(rows[wave][8 * i + lane / 4] + lane % 4 * 4);
  sync_wave();
}

// Nothing is there before it is waited for.
typedef std::vector<std::function<void()>> Group;
inline std::vector<Group> &groups_on_their_way() {
  static std::vector<Group> groups[1024];
  std::vector<Group> &own = groups[thread_id()];
  if (own.empty()) own.emplace_back();
  return own;
}
GPU_DEVICE void copy16(void *shared, const void *global) {
  groups_on_their_way().back().push_back([=] { __builtin_memcpy(shared, global, 16); });
}
GPU_DEVICE void commit() { groups_on_their_way().emplace_back(); }
template <int kLeft>
GPU_DEVICE void wait() {
  std::vector<Group> &groups = groups_on_their_way();
  while (groups.size() > kLeft + 1) {
    for (auto &copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

#elif defined(HALO_MMA_SYNC)

typedef float2 Two;

// acc += A B. A: 16 rows x 32 bytes, signed or not. B: 8 columns x 32 bytes, signed.
template <bool kSignedA>
GPU_DEVICE void multiply8(int *acc, const uint32_t *a, uint32_t b0, uint32_t b1) {
  if (kSignedA)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

GPU_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Four 8 x 16 byte matrices; lanes 8 i to 8 i + 7 point to the rows of matrix i.
GPU_DEVICE void load_matrices(uint32_t *w, const uint8_t *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, in the background: commit() ends a group of them, wait<n>() waits until all but
// the last n groups are there (the own thread's).
GPU_DEVICE void copy16(void *shared, const void *global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
GPU_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
GPU_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#else

#if defined(HALO_SIM)

// acc[i] += A[i] B: `kCount` instructions at once, since the lanes' meeting is what costs here.
template <int kCount, bool kSignedA, bool kSignedB>
GPU_DEVICE void multiply16(int (*acc)[8], const uint4 *a, const uint4 &b) {
  static uint4 rows[32][kCount][kWave], columns[32][kWave];  // what the lanes of a wave hand to each other
  const int lane = lane_id(), wave = wave_id();
  for (int i = 0; i < kCount; ++i) rows[wave][i][lane] = a[i];
  columns[wave][lane] = b;
  sync_wave();
  for (int i = 0; i < kCount; ++i)
    for (int v = 0; v < 8; ++v) {
      const uint8_t *x = (const uint8_t *)&rows[wave][i][2 * v + lane / 16], *y = (const uint8_t *)&columns[wave][lane % 16];
      for (int k = 0; k < 16; ++k)
        acc[i][v] += (kSignedA ? (int8_t)x[k] : (int)x[k]) * (kSignedB ? (int8_t)y[k] : (int)y[k]);
    }
  sync_wave();
}

#else

template <int kCount, bool kSignedA, bool kSignedB>
GPU_DEVICE void multiply16(int (*acc)[8], const uint4 *a, const uint4 &b) {
  typedef int Four __attribute__((ext_vector_type(4)));
  typedef int Eight __attribute__((ext_vector_type(8)));
  const Four right = {(int)b.x, (int)b.y, (int)b.z, (int)b.w};
  GPU_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const Four left = {(int)a[i].x, (int)a[i].y, (int)a[i].z, (int)a[i].w};
    Eight c = {acc[i][0], acc[i][1], acc[i][2], acc[i][3], acc[i][4], acc[i][5], acc[i][6], acc[i][7]};
    c = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(kSignedA, left, kSignedB, right, c, false);
    GPU_UNROLL
    for (int v = 0; v < 8; ++v) acc[i][v] = c[v];
  }
}

#endif
#endif

// The attention multiplies sixteen queries with sixteen items (positions, or elements of the values), 32 bytes along k,
// and wants each lane to have results of few queries and of neighbouring items: `kRun` of them, the run'th of the
// sixteen. mma.sync takes the queries as A, WMMA as B. Items lie in the order of `item_of`, so that it comes out so
// although each 16 lanes read 256 bytes in a row, without bank conflicts.
#if defined(HALO_MMA_SYNC)
const int kLaneQueries = 2, kRun = 4, kRunLanes = 1;  // kRunLanes: distance of the lanes that have the next run
GPU_DEVICE int run_of_lane() { return lane_id() % 4; }
GPU_DEVICE int query_of_lane(int q) { return lane_id() / 4 + 8 * q; }
GPU_DEVICE int result(int q, int i) { return i / 2 * 4 + 2 * q + i % 2; }  // where item i of the run is in acc
GPU_DEVICE int item_of(int unit) { return unit % 8 / 2 * 4 + unit / 8 * 2 + unit % 2; }
struct Operand {
  uint32_t w[4];
};
#else
const int kLaneQueries = 1, kRun = 8, kRunLanes = 16;
GPU_DEVICE int run_of_lane() { return lane_id() / 16; }
GPU_DEVICE int query_of_lane(int) { return lane_id() % 16; }
GPU_DEVICE int result(int, int i) { return i; }
GPU_DEVICE int item_of(int unit) { return unit % 2 * 8 + unit / 2; }
struct Operand {
  uint4 k[2];  // 16 bytes along k each
};
#endif

// 16 items from [k / 16][16 units][16 bytes], `stride` bytes from one k to the next.
GPU_DEVICE Operand load_items(const uint8_t *at, int stride) {
  Operand x;
  const int lane = fresh(lane_id());
#if defined(HALO_MMA_SYNC)
  load_matrices(x.w, at + lane / 8 % 2 * stride + (lane / 16 * 8 + lane % 8) * 16);
#else
  x.k[0] = *(const uint4 *)(at + lane % 16 * 16);
  x.k[1] = *(const uint4 *)(at + stride + lane % 16 * 16);
#endif
  return x;
}

// 16 queries from [k / 16][16][16 bytes].
GPU_DEVICE Operand load_queries(const uint8_t *at) {
#if defined(HALO_MMA_SYNC)
  Operand x;
  load_matrices(x.w, at + lane_id() * 16);
  return x;
#else
  return load_items(at, 256);
#endif
}

// The word of the lane 16 further, around the wave.
GPU_DEVICE uint32_t other_half(uint32_t x) {
#if defined(__HIP__)
  return (uint32_t)__builtin_amdgcn_permlanex16((int)x, (int)x, 0x76543210, (int)0xfedcba98, false, false);
#else
  return shuffle_xor(x, 16);
#endif
}

// Bytes of a lane's results: for each query, of kRun items, four to a word.
struct Bytes {
  uint32_t w[kLaneQueries][kRun / 4];
};

// The queries' operand from the bytes of two times sixteen items.
GPU_DEVICE Operand turn_results(const Bytes &first, const Bytes &second) {
  Operand x;
#if defined(HALO_MMA_SYNC)
  x.w[0] = first.w[0][0], x.w[1] = first.w[1][0], x.w[2] = second.w[0][0], x.w[3] = second.w[1][0];
#else
  // Each half-wave has half of what both must have.
  const bool upper = lane_id() >= 16;
  GPU_UNROLL
  for (int k = 0; k < 2; ++k) {
    const uint32_t a = k ? second.w[0][0] : first.w[0][0], b = k ? second.w[0][1] : first.w[0][1];
    const uint32_t c = other_half(a), d = other_half(b);
    x.k[k].x = upper ? c : a, x.k[k].y = upper ? d : b, x.k[k].z = upper ? a : c, x.k[k].w = upper ? b : d;
  }
#endif
  return x;
}

template <bool kSignedQueries>
GPU_DEVICE void multiply(int (&acc)[8], const Operand &items, const Operand &queries) {
#if defined(HALO_MMA_SYNC)
  multiply8<kSignedQueries>(acc, queries.w, items.w[0], items.w[1]);
  multiply8<kSignedQueries>(acc + 4, queries.w, items.w[2], items.w[3]);
#else
  GPU_UNROLL
  for (int k = 0; k < 2; ++k) multiply16<1, true, kSignedQueries>(&acc, &items.k[k], queries.k[k]);
#endif
}

}  // namespace mma
}  // namespace halo
