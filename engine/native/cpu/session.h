// The forward pass of BitNet b1.58 over KV slots. All memory is taken when a session is made; a run takes none.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "kernels.h"
#include "model.h"
#include "pool.h"

namespace halo {

// What a run is asked for; the arrays are the caller's.
struct Batch {
  int n;
  const int32_t *tokens, *slots, *positions;
  const uint8_t *want;
  float *logits;  // one of logits and ids is not null
  size_t logits_count;
  int32_t *ids;
  size_t ids_count;
};

class Session {
 public:
  Session(std::shared_ptr<const Model> model, int slots, int context, int threads, const Kernels &kernels,
          KvForm kv);

  void run(const Batch &batch);  // throws Failure
  std::string facts();

 private:
  // y = ternary(w) applied to the quantised rows; written to, or added to, `out`.
  struct Product {
    const Ternary *w;
    float *out;
    int stride;
    bool add;
  };

  void check(const Batch &batch) const;
  int chunk_end(const Batch &batch, int start) const;
  void forward(const Batch &batch, int start, int end);
  void embed(const int32_t *tokens, int count);
  void attention(int index, const Batch &batch, int start, int count);
  void feed_forward(int index, int count);
  void norm_and_quantize(const float *x, int stride, const float *weight, int n, int count);
  void quantize_token(int t, const float *x, int n);
  void multiply(const Product *products, int product_count, int count);
  void multiply_block(const Product &product, int first, int count);
  int gather_wanted(const Batch &batch, int start, int end);
  void head(const Batch &batch, int wanted, size_t done);
  void head_block(int block, int wanted, float *logits);

  std::shared_ptr<const Model> model_;
  const Kernels &kernels_;
  const int slots_, context_, head_dim_;
  const int hidden_row_, inter_row_, qkv_row_, quant_row_;
  Pool pool_;
  std::mutex running_;
  std::atomic<bool> not_finite_{false};
  std::vector<int32_t> lengths_;  // tokens in each slot
  Attention attention_;
  Buffer<float> x_, normed_, qkv_, attended_, gate_, up_;
  Buffer<int8_t> quantized_;
  Buffer<float> scales_, best_;
  Buffer<int32_t> sums_, best_ids_;
};

}  // namespace halo
