// A prepared model file, loaded and checked. It knows where the tensors are, not what is done with them.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "../halo.h"
#include "buffer.h"

namespace halo {

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Ternary {
  const uint8_t *codes;  // tiles: engine/formats/tiles.py
  const float *scales;   // [rows]
  int rows, cols;
};

// Rows of full precision, bfloat16 or float32: the embedding, or an output head of its own.
struct Rows {
  const uint8_t *data;
  size_t row_bytes;
  bool bf16;

  const uint8_t *row(int index) const { return data + (size_t)index * row_bytes; }
};

// The output head at six bits, with what bounds its error: docs/exact-head.md.
struct Coarse {
  const uint8_t *tiles;
  const float *scale, *error, *norm;  // [vocab]
};

struct Layer {
  const float *input_norm, *post_attn_norm;
  const float *attn_sub_norm, *ffn_sub_norm;  // null where the model has none
  Ternary q, k, v, o, gate, up, down;
};

class Model {
 public:
  // Throws Failure. `copy`: what every token reads goes into huge pages; else all stays mapped.
  explicit Model(const char *path, bool copy = true);
  ~Model();
  Model(const Model &) = delete;
  Model &operator=(const Model &) = delete;

  int head_dim() const { return config.head_dim; }
  int q_size() const { return config.num_heads * config.head_dim; }

  halo_config config;
  Rows embedding, head;  // one and the same where the embedding is tied
  Coarse coarse;
  const float *final_norm;
  const float *rope_cos, *rope_sin;  // [max_seq_len][rope_row]
  int rope_row;
  std::vector<Layer> layers;

 private:
  struct Entry;
  struct Piece;
  void map(const char *path);
  void read_header();
  void read_directory();
  void load(bool copy);
  void check_padding(const std::vector<Entry> &entries) const;
  void check_rope() const;
  const uint8_t *tensor(const std::string &name, uint32_t dtype, int rows, int cols, uint32_t row_bytes, size_t bytes);
  const float *floats(const std::string &name, int rows, int cols);
  Ternary ternary(const std::string &name, int rows, int cols);
  Rows rows(const std::string &name);
  void read_layer(const std::string &prefix);

  std::string path_;
  const uint8_t *data_ = nullptr;
  size_t size_ = 0;
  uint32_t count_ = 0, next_ = 0;
  size_t hot_ = 0;                         // bytes from the file's start that every token reads
  std::unique_ptr<Buffer<uint8_t>> copy_;  // of these, in huge pages
};

}  // namespace halo
