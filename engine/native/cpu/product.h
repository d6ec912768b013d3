// Ternary products of a chunk of tokens: quantise once, multiply by any matrices. It knows nothing of layers.
#pragma once
#include <atomic>

#include "buffer.h"
#include "kernels.h"
#include "model.h"
#include "pool.h"

namespace halo {

// y = ternary(w) applied to the quantised rows; written to, or added to, `out`, rows of `stride` floats.
struct Product {
  const Ternary *w;
  float *out;
  int stride;
  bool add;
};

class Quantized {
 public:
  // Room for `tokens` rows of up to `columns` activations.
  Quantized(int tokens, int columns, const Kernels &kernels, Pool &pool);

  // Take `count` rows of n floats, `stride` apart and filled up with zeros to 16. False if one is not finite.
  // With `norm`, the rows go through RMSNorm first.
  bool take(const float *x, int stride, const float *norm, int n, float eps, int count);

  // Multiply the rows by each matrix.
  void multiply(const Product *products, int product_count);

 private:
  void take_row(int t, const float *x, const float *norm, int n, float eps);
  void multiply_blocks(const Product &product, int first, int blocks);

  const Kernels &kernels_;
  Pool &pool_;
  const int columns_;  // filled up to whole chunks
  int count_ = 0, used_ = 0;
  Buffer<float> normed_, scales_;
  Buffer<int8_t> rows_;
  Buffer<int32_t> packed_, offsets_;
  std::atomic<bool> not_finite_{false};
};

}  // namespace halo
