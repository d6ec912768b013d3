// Uploads a model: what is as it should be is copied, the ternary tiles are repacked on the device from one bounce buffer.
#include "model.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "../cpu/failure.h"
#include "../cpu/kernels.h"

namespace halo {
namespace {

size_t tile_bytes(const Ternary &t) {
  return (size_t)(round_up(t.rows, kRows) / kRows) * (round_up(t.cols, kTernaryCols) / kTernaryCols) * kTernaryChunk;
}

Packing chosen_packing() {
  const char *name = getenv("HALO_GPU_PACKING");
  if (!name || !*name) return device().backend == "hip" ? Packing::base_three : Packing::two_bits;
  if (!strcmp(name, "two_bits")) return Packing::two_bits;
  if (!strcmp(name, "base_three")) return Packing::base_three;
  throw Failure(HALO_INVALID, "HALO_GPU_PACKING is '%.40s'; there are two_bits and base_three", name);
}

void check_shape(const halo_config &c) {
  if (c.head_dim > 256)
    throw Failure(HALO_UNSUPPORTED, "heads of %d elements are more than the GPU's attention holds (256)", c.head_dim);
  if (c.num_heads / c.num_kv_heads > kMostGroup)
    throw Failure(HALO_UNSUPPORTED, "%d query heads to a KV head are more than the GPU's attention holds (%d)",
                  c.num_heads / c.num_kv_heads, kMostGroup);
  const size_t room = device().shared_bytes;
  const int longest = std::max({c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim});
  if (least_row_bytes(longest) > room)
    throw Failure(HALO_UNSUPPORTED, "rows of %d activations are more than the %zu bytes of a block of threads hold", longest,
                  room);
  if (attention_bytes(c.num_heads / c.num_kv_heads, round_up(c.head_dim, 16)) > room)
    throw Failure(HALO_UNSUPPORTED, "%d query heads of %d elements to a KV head are more than the %zu bytes of a block hold",
                  c.num_heads / c.num_kv_heads, c.head_dim, room);
}

}  // namespace

class GpuModel::Loader {
 public:
  explicit Loader(GpuModel &model) : model_(model) {
    size_t most = 0;
    for (const Layer &layer : model.host_.layers)
      most = std::max({most, tile_bytes(layer.q) + tile_bytes(layer.k) + tile_bytes(layer.v), tile_bytes(layer.o),
                       tile_bytes(layer.gate) + tile_bytes(layer.up), tile_bytes(layer.down)});
    bounce_ = DeviceBytes(most, "loading the model");
  }

  const float *floats(const float *from, int rows, int row) {
    if (!from) return nullptr;
    return (const float *)copy(from, (size_t)rows * row * 4);
  }

  const uint8_t *copy(const void *from, size_t bytes) {
    DeviceBytes memory = take(bytes);
    stream_.copy_in(memory.as<>(), from, bytes);
    return keep(std::move(memory));
  }

  Rows rows(const Rows &from) {
    Rows own = from;
    own.data = copy(from.data, from.row_bytes * (size_t)model_.host_.config.vocab_size);
    return own;
  }

  // Up to three matrices of the same columns as one, their rows behind one another or in turns.
  Matrix matrix(std::initializer_list<const Ternary *> sources, bool interleaved) {
    const Ternary &first = **sources.begin();
    Matrix m = {};
    RepackArgs args = {};
    const uint8_t **places[] = {&args.first, &args.second, &args.third};
    size_t at = 0;
    int number = 0;
    for (const Ternary *source : sources) {
      stream_.copy_in(bounce_.as<>() + at, source->codes, tile_bytes(*source));
      *places[number++] = bounce_.as<>() + at;
      at += tile_bytes(*source);
      m.rows += source->rows;
    }
    const int cols = step_cols(model_.packing_);
    m.cols = first.cols;
    m.packing = model_.packing_;
    m.tile_count = (m.rows + kTileRows - 1) / kTileRows;
    m.steps = (m.cols + cols - 1) / cols;
    args.first_rows = first.rows;
    args.second_rows = number > 1 ? (*(sources.begin() + 1))->rows : 0;
    args.interleaved = interleaved;
    args.rows = m.rows, args.cols = m.cols, args.tile_count = m.tile_count, args.steps = m.steps;
    DeviceBytes tiles = take((size_t)m.tile_count * m.steps * kStepBytes);
    args.tiles = tiles.as<uint32_t>();
    launch_repack(args, model_.packing_, stream_);
    m.tiles = keep(std::move(tiles));
    m.scales = scales(sources, interleaved);
    return m;
  }

  Stream &stream() { return stream_; }
  void finish() { stream_.sync(); }

 private:
  DeviceBytes take(size_t bytes) {
    model_.bytes_ += bytes;
    return DeviceBytes(bytes, "the model");
  }

  const uint8_t *keep(DeviceBytes memory) {
    model_.memory_.push_back(std::move(memory));
    return model_.memory_.back().as<>();
  }

  const float *scales(std::initializer_list<const Ternary *> sources, bool interleaved) {
    std::vector<float> all;
    for (const Ternary *source : sources) all.insert(all.end(), source->scales, source->scales + source->rows);
    if (interleaved) {
      const size_t half = all.size() / 2;
      std::vector<float> turns(all.size());
      for (size_t i = 0; i < half; ++i) turns[2 * i] = all[i], turns[2 * i + 1] = all[half + i];
      all = turns;
    }
    const float *result = (const float *)copy(all.data(), all.size() * 4);
    stream_.sync();  // `all` ends here
    return result;
  }

  GpuModel &model_;
  Stream stream_;
  DeviceBytes bounce_;
};

GpuModel::GpuModel(const char *path) : host_(path, false), packing_(chosen_packing()) {
  const halo_config &c = host_.config;
  check_shape(c);
  Loader loader(*this);
  final_norm = loader.floats(host_.final_norm, 1, round_up(c.hidden_size, 16));
  rope_cos = loader.floats(host_.rope_cos, c.max_seq_len, host_.rope_row);
  rope_sin = loader.floats(host_.rope_sin, c.max_seq_len, host_.rope_row);
  for (const Layer &from : host_.layers) {
    GpuLayer layer;
    layer.input_norm = loader.floats(from.input_norm, 1, round_up(c.hidden_size, 16));
    layer.post_attn_norm = loader.floats(from.post_attn_norm, 1, round_up(c.hidden_size, 16));
    layer.attn_sub_norm = loader.floats(from.attn_sub_norm, 1, round_up(q_size(), 16));
    layer.ffn_sub_norm = loader.floats(from.ffn_sub_norm, 1, round_up(c.intermediate_size, 16));
    layer.qkv = loader.matrix({&from.q, &from.k, &from.v}, false);
    layer.o = loader.matrix({&from.o}, false);
    layer.gate_up = loader.matrix({&from.gate, &from.up}, true);
    layer.down = loader.matrix({&from.down}, false);
    layers.push_back(layer);
  }
  embedding = loader.rows(host_.embedding);
  head = c.tie_embeddings ? embedding : loader.rows(host_.head);
  head_weights_ = std::make_unique<HeadWeights>(host_, HeadRows{head.data, head.row_bytes, head.bf16}, loader.stream());
  loader.finish();
}

}  // namespace halo
