// The forward pass on the device, over KV slots: the same calls and the same results as cpu/session.h's.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../cpu/batch.h"
#include "head.h"
#include "model.h"
#include "prefill_launch.h"

namespace halo {

std::string device_facts();

// See halo_ternary_sums; `path` is NULL, "two_bits" or "base_three".
void ternary_sums(const char *path, const uint8_t *codes, int rows, int cols, const int8_t *x, int tokens, int32_t *sums);

class GpuSession {
 public:
  // path: how a step is put on the device, "graph" (NULL: the same) or "eager". kv: "int8" (NULL), "f16", "rotor3".
  GpuSession(std::shared_ptr<const GpuModel> model, int slots, int context, const char *path, const char *kv);

  void run(const Batch &batch);  // throws Failure
  void logits_again(int k, float *logits, size_t count);  // throws Failure
  void copy(int from, int to, int length);                // throws Failure
  std::string facts();

 private:
  void put_inputs(const Batch &batch, int start, int count);
  void put_layers(int count);
  void put_decode_layer(const GpuLayer &layer, int index, int count);
  void put_prefill_layer(const GpuLayer &layer, int index, int count);
  void put_norm(const float *x, int stride, const float *norm, int n, const Matrix &next, int count);
  void put_product(const Matrix &matrix, const float *x, const float *norm, int count, float *out, int out_stride,
                   Epilogue epilogue);
  AttentionArgs attention_args(int index, int count) const;
  void put_argmax(int count);
  void put_publish(int count);
  void draw(const Draw &draw, int wanted, size_t done);
  void all_logits(float *logits, int wanted);
  void decode(const Batch &batch, int start, int count, int wanted, size_t done);
  void results(const Batch &batch, int wanted, size_t done);
  void settle(const Batch &batch);

  std::shared_ptr<const GpuModel> model_;
  const int slots_, context_;
  const bool graphs_wanted_;
  const KvStore form_;
  const int most_;  // tokens of a chunk
  const int hidden_row_, q_row_, inter_row_, qkv_row_;
  Stream stream_;
  std::mutex running_;
  std::vector<int32_t> lengths_;  // tokens in each slot
  int kept_ = 0;                  // the last run's wanted entries whose hidden states the head has kept
  bool own_slots_ = true;         // no two tokens of this chunk are of the same slot
  DeviceBytes status_, cache_, cache_scales_, partial_, counts_, x_, qkv_, attended_, gate_, q8_, q8_facts_, places_, ids_, rope_now_;
  int q8_stride_;
  SharedBytes inputs_, outputs_;  // tokens, slots, positions, wanted; status, ids
  GpuHead head_;
  DeviceBytes logits_, draw_, prefill_tiles_;  // taken when they are first needed
  std::vector<PrefillTile> tiles_;             // of this chunk
  std::map<int, Graph> graphs_;  // by tokens, of a step that ends in the arg max of each
};

}  // namespace halo
