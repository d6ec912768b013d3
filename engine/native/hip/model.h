// A prepared model on the device: one copy of its weights, in the device's layout. Not the file's reader: cpu/model.h.
#pragma once
#include <memory>
#include <vector>

#include "../cpu/model.h"
#include "head.h"
#include "kernels.h"

namespace halo {

struct GpuLayer {
  const float *input_norm, *post_attn_norm, *attn_sub_norm, *ffn_sub_norm;  // the last two null where there are none
  Matrix qkv, o, gate_up, down;
};

class GpuModel {
 public:
  // Checks the file, byte for byte, and uploads it tensor by tensor. Throws Failure. The packing is the environment's
  // HALO_GPU_PACKING (two_bits, base_three), else the device's own.
  explicit GpuModel(const char *path);

  const halo_config &config() const { return host_.config; }
  const Model &host() const { return host_; }
  int q_size() const { return host_.q_size(); }
  Packing packing() const { return packing_; }
  size_t bytes() const { return bytes_ + head_weights_->bytes(); }  // on the device
  const HeadWeights &head_weights() const { return *head_weights_; }

  std::vector<GpuLayer> layers;
  const float *final_norm, *rope_cos, *rope_sin;
  Rows embedding, head;  // on the device

 private:
  class Loader;
  const Model host_;  // mapped
  Packing packing_;
  size_t bytes_ = 0;
  std::vector<DeviceBytes> memory_;
  std::unique_ptr<HeadWeights> head_weights_;
};

}  // namespace halo
