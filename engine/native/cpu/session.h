// The forward pass of BitNet b1.58 over KV slots. All memory is taken when a session is made; a run takes none.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "batch.h"
#include "buffer.h"
#include "head.h"
#include "kernels.h"
#include "model.h"
#include "pool.h"
#include "product.h"

namespace halo {

class Session {
 public:
  Session(std::shared_ptr<const Model> model, int slots, int context, int threads, const Kernels &kernels,
          KvForm kv);

  void run(const Batch &batch);  // throws Failure
  void logits_again(int k, float *logits, size_t count);  // throws Failure
  void copy(int from, int to, int length);                // throws Failure
  std::string facts();

 private:
  void forward(const Batch &batch, int start, int end);
  void embed(const int32_t *tokens, int count);
  void attention(int index, const Batch &batch, int start, int count);
  void feed_forward(int index, int count);
  void quantize(const float *x, int stride, const float *norm, int n, int count);
  int gather_wanted(const Batch &batch, int start, int end);
  void head(const Batch &batch, int wanted, size_t done);

  std::shared_ptr<const Model> model_;
  const Kernels &kernels_;
  const int slots_, context_;
  const int hidden_row_, q_row_, inter_row_, qkv_row_;
  Pool pool_;
  std::mutex running_;
  std::vector<int32_t> lengths_;  // tokens in each slot
  bool not_finite_ = false;
  int kept_ = 0;  // rows of normed_ that are the last run's wanted entries
  Attention attention_;
  Quantized quantized_;
  Head head_;
  Buffer<float> x_, normed_, qkv_, attended_, gate_, up_;
};

}  // namespace halo
