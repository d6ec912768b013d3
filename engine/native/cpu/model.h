// A prepared model file, mapped and checked. It knows where the tensors are, not what is done with them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>
#include <vector>

#include "../halo.h"

namespace halo {

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Ternary {
  const uint8_t *codes;  // [rows][row_bytes]
  const float *scales;   // [rows]
  int rows, cols, row_bytes;
};

struct Layer {
  const float *input_norm, *post_attn_norm, *attn_sub_norm, *ffn_sub_norm;
  Ternary q, k, v, o, gate, up, down;
};

class Model {
 public:
  explicit Model(const char *path);  // throws Failure
  ~Model();
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;

  int head_dim() const { return config.hidden_size / config.num_heads; }

  halo_config config;
  const uint8_t *embedding;  // [vocab][embedding_row_bytes], bfloat16 or float32
  size_t embedding_row_bytes;
  bool embedding_bf16;
  const float *final_norm;
  const float *rope_cos, *rope_sin;  // [max_seq_len][rope_row]
  int rope_row;
  std::vector<Layer> layers;

 private:
  struct Entry;
  void map(const char *path);
  void read_header();
  void read_tensors();
  const uint8_t *tensor(const char *name, uint32_t dtype, int rows, int cols, size_t row_bytes);
  const float *floats(const char *name, int rows, int cols);
  Ternary ternary(const char *name, int rows, int cols);

  std::string path_;
  const uint8_t *data_ = nullptr;
  size_t size_ = 0;
  uint32_t count_ = 0, next_ = 0;
};

}  // namespace halo
