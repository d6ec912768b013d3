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

struct Kernels {
  const char *name;

  // sums[t * sums_stride + r] = sum over j of code[r][j] * x[t][j], codes 0..3 in the prepared layout of `row_bytes`
  // bytes a row (a multiple of 16). x[t] has 4 * row_bytes values, zero beyond the columns, and 64 readable bytes more.
  void (*ternary)(const uint8_t *codes, int row_bytes, int rows, const int8_t *x, size_t x_stride, int tokens,
                  int32_t *sums, size_t sums_stride);

  // y = x * (1 / sqrt(mean(x^2) + eps)) * weight, over n elements.
  void (*rmsnorm)(const float *x, const float *weight, int n, float eps, float *y);

  // q = round_half_even(x * s), s = 127 / max(max|x|, 1e-5). False if x holds a NaN or an infinity.
  bool (*quantize)(const float *x, int n, int8_t *q, float *scale);

  // y = relu(gate)^2 * up
  void (*relu2)(const float *gate, const float *up, int n, float *y);

  // out[r] = dot(row r, x); rows are row_bytes apart, of bfloat16 or float32.
  void (*dot_rows)(const uint8_t *rows, size_t row_bytes, bool bf16, int count, const float *x, int n, float *out);

  const AttentionKernels *attention;
};

// The tables. Each file defines its own where it is compiled for its architecture.
extern const Kernels scalar_table, avx2_table, avx512_table, neon_table, neondot_table;

}  // namespace halo
