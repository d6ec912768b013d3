// Rows are packed in tiles of kTileTokens tokens: the four activations of a group stand beside those of the other
// tokens, in the order in which `ternary` reads them.
#include "product.h"

#include <string.h>

#include <algorithm>

namespace halo {
namespace {

const int kBlocks = 8;  // blocks of 16 rows in one item of work

int blocks_of(const Ternary &w) { return round_up(w.rows, kRows) / kRows; }
int items_of(const Ternary &w) { return (blocks_of(w) + kBlocks - 1) / kBlocks; }

}  // namespace

Quantized::Quantized(int tokens, int columns, const Kernels &kernels, Pool &pool)
    : kernels_(kernels),
      pool_(pool),
      columns_(round_up(columns, kTernaryCols)),
      normed_(tokens, columns_),
      scales_(tokens, 1),
      rows_(tokens, columns_),
      packed_(tokens, columns_ / 4),
      offsets_(tokens, 1) {}

bool Quantized::take(const float *x, int stride, const float *norm, int n, float eps, int count) {
  count_ = count;
  used_ = round_up(n, kTernaryCols);
  not_finite_ = false;
  pool_.each(count, [&](int t, int) { take_row(t, x + (size_t)t * stride, norm, n, eps); });
  return !not_finite_;
}

void Quantized::take_row(int t, const float *x, const float *norm, int n, float eps) {
  int8_t *q = &rows_[(size_t)t * columns_];
  int lanes = round_up(n, 16), first = t / kTileTokens * kTileTokens, width = std::min(kTileTokens, count_ - first);
  if (norm) {
    float *y = &normed_[(size_t)t * columns_];
    kernels_.rmsnorm(x, norm, n, eps, y);
    x = y;
  }
  if (!kernels_.quantize(x, lanes, q, &scales_[t])) {
    not_finite_ = true;
    memset(q, 0, (size_t)lanes);
    scales_[t] = 1.0f;
  }
  memset(q + lanes, 0, (size_t)(used_ - lanes));
  int32_t sum = 0;
  for (int i = 0; i < lanes; ++i) sum += q[i];
  offsets_[t] = sum;
  int32_t *packed = &packed_[(size_t)first * (used_ / 4)] + (t - first);
  for (int group = 0; group < used_ / 4; ++group) memcpy(packed + (size_t)group * width, q + 4 * group, 4);
}

void Quantized::multiply(const Product *products, int product_count) {
  int items = 0;
  for (int p = 0; p < product_count; ++p) items += items_of(*products[p].w);
  pool_.each(items, [&](int item, int) {
    const Product *product = products;
    while (item >= items_of(*product->w)) item -= items_of(*(product++)->w);
    int first = item * kBlocks;
    multiply_blocks(*product, first, std::min(kBlocks, blocks_of(*product->w) - first));
  });
}

// The codes are weight + 1, so the sum of the activations comes off once a row.
void Quantized::multiply_blocks(const Product &product, int first, int blocks) {
  const Ternary &w = *product.w;
  int chunks = used_ / kTernaryCols;
  const size_t block_bytes = (size_t)chunks * kTernaryChunk;
  int32_t sums[kBlocks * kTileTokens * kRows];
  for (int block = 0; block < blocks; block += count_ > 1 ? 2 : blocks) {
    int some = count_ > 1 ? std::min(2, blocks - block) : blocks;  // few enough for their codes to stay in L1
    for (int t = 0; t < count_; t += kTileTokens) {
      int tokens = std::min(kTileTokens, count_ - t);
      kernels_.ternary(w.codes + (first + block) * block_bytes, some, chunks, &packed_[(size_t)t * (used_ / 4)], tokens,
                       sums);
      for (int b = 0; b < some; ++b) {
        int row = (first + block + b) * kRows;
        kernels_.finish(sums + b * tokens * kRows, tokens, std::min(kRows, w.rows - row), w.scales + row, &offsets_[t],
                        &scales_[t], product.out + (size_t)t * product.stride + row, (size_t)product.stride,
                        product.add);
      }
    }
  }
}

}  // namespace halo
