// The table of kernels that each CPU path fills in, and the rules that make every path give the same bytes.
//
// Integers: a ternary dot product is exact in int32, whatever its order.
// Floats: a sum of products runs through 16 virtual lanes (element i goes to lane i % 16, fused multiply-add, rising
// i) and the lanes are added as a tree: l with l+8, then l+4, l+2, l+1. Everything else is element by element. All
// files are compiled with -ffp-contract=off, so only what is written as fma is fused. engine/reference.py says the
// same in NumPy.
//
// Every float array handed to a kernel is filled up with zeros to a multiple of 16 elements.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "attention_kernels.h"

namespace halo {

const int kRows = 16;           // rows of a matrix that lie side by side, in the lanes of a vector
const int kTileTokens = 12;     // tokens that one call of `ternary` takes at most
const int kTernaryChunk = 320;  // bytes of 16 rows x 96 columns of a ternary matrix: engine/formats/tiles.py
const int kTernaryCols = 96;
const int kCoarseChunk = 192;  // bytes of 16 rows x 16 columns of the coarse head
const int kCoarseCols = 16;
const int kCoarseVectors = 8;  // vectors that one call of `coarse` takes at most

// One token as the coarse head sees it: x is about step * (256 high + low), where low may be nothing at all.
// See docs/exact-head.md.
struct CoarseToken {
  float half_step;           // step / 2
  float by_error, by_norm;   // |exact - coarse| <= by_error * error of the row + by_norm * norm of the row
  int32_t high_sum, low_sum; // sums of high and of low
};

// What `coarse_bounds` found in some rows: the largest certain logit, and the row that looks best.
struct CoarseBest {
  float certain, seen;
  int row;
};

struct Kernels {
  const char *name;

  // sums[(block * tokens + t) * 16 + r] = sum over j of code[16 * block + r][j] * x[t][j], for `blocks` consecutive
  // blocks of `chunks` chunks. x is packed: four activations of group g of token t are the bytes of x[g * tokens + t],
  // 24 groups a chunk. What follows the codes may be prefetched, not read.
  void (*ternary)(const uint8_t *codes, int blocks, int chunks, const int32_t *x, int tokens, int32_t *sums);

  // out[t * stride + r] = (float)(sums[t * 16 + r] - offset[t]) * weight_scale[r] / x_scale[t], or is added to out,
  // for `rows` <= 16 rows of one block.
  void (*finish)(const int32_t *sums, int tokens, int rows, const float *weight_scale, const int32_t *offset,
                 const float *x_scale, float *out, size_t stride, bool add);

  // y = x * (1 / sqrt(mean(x^2) + eps)) * weight, over n elements.
  void (*rmsnorm)(const float *x, const float *weight, int n, float eps, float *y);

  // q = round_half_even(x * s), s = 127 / max(max|x|, 1e-5). False if x holds a NaN or an infinity.
  bool (*quantize)(const float *x, int n, int8_t *q, float *scale);

  // y = max(gate, 0)^2 * up
  void (*relu2)(const float *gate, const float *up, int n, float *y);

  // y = silu(gate) * up, as engine/reference.py defines it.
  void (*silu)(const float *gate, const float *up, int n, float *y);

  // out[r] = dot(row r, x); rows are row_bytes apart, of bfloat16 or float32.
  void (*dot_rows)(const uint8_t *rows, size_t row_bytes, bool bf16, int count, const float *x, int n, float *out);

  // One block of the coarse head times up to kCoarseVectors int8 vectors: sums[v * 16 + r] of u * x. x is packed: the
  // four numbers of group g of vector v are the bytes of x[g * vectors + v].
  void (*coarse)(const uint8_t *tiles, int chunks, const int32_t *x, int vectors, int32_t *sums);

  // The upper bounds of `rows` <= 16 logits from one token's sums of u * high and u * low; updates `best`.
  void (*coarse_bounds)(const int32_t *high_sums, const int32_t *low_sums, int rows, int first_row, const float *scale,
                        const float *error, const float *norm, const CoarseToken &token, float *upper,
                        CoarseBest *best);

  const AttentionKernels *attention;
};

// The tables. Each file defines its own where it is compiled for its architecture.
extern const Kernels scalar_table, avx2_table, avx512_table, avx512vbmi_table, neon_table, neondot_table;

}  // namespace halo
