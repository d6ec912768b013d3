// A decode step of up to 16 tokens is a graph that reads its inputs from the host's memory and writes its results there;
// longer batches go through the prefill kernels in chunks. One synchronisation either way.
#include "session.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "../cpu/failure.h"

namespace halo {
namespace {

const int kMostChunk = 1024;  // tokens that go through the layers together

KvStore kv_store(const char *name) {
  if (!name || !strcmp(name, "int8")) return KvStore::int8;
  if (!strcmp(name, "f16")) return KvStore::f16;
  if (!strcmp(name, "rotor3")) return KvStore::rotor3;
  if (!strcmp(name, "f32")) throw Failure(HALO_UNSUPPORTED, "the GPU keeps no KV cache of f32; there are f16, int8 and rotor3");
  throw Failure(HALO_INVALID, "'%.40s' is no form of the KV cache; there are f16, int8 and rotor3", name);
}

const char *kv_name(KvStore form) {
  return form == KvStore::f16 ? "f16" : form == KvStore::int8 ? "int8" : "rotor3";
}

bool wants_graphs(const char *path) {
  if (!path || !strcmp(path, "graph")) return true;
  if (!strcmp(path, "eager")) return false;
  throw Failure(HALO_INVALID, "'%.40s' is no way to run a step; there are graph and eager", path);
}

KvShape kv_shape(const halo_config &c, KvStore form, int context) {
  if (form == KvStore::rotor3 && (c.head_dim < 32 || (c.head_dim & (c.head_dim - 1))))
    throw Failure(HALO_UNSUPPORTED, "the KV form rotor3 needs heads of 32, 64, 128 or 256 elements, not %d", c.head_dim);
  return {form, c.num_layers, c.num_kv_heads, c.head_dim, round_up(c.head_dim, 16), round_up(context, kBlockOfKv)};
}

size_t heads_of(const KvShape &s, int slots) { return (size_t)slots * s.layers * s.kv_heads; }

std::string text_of_bytes(size_t bytes) { return std::to_string(bytes); }

}  // namespace

std::string device_facts() {
  const DeviceFacts &d = device();
  MemoryFacts memory = device_memory();
  return "{\"backend\":\"" + d.backend + "\",\"abi\":" + std::to_string(HALO_ABI_VERSION) +
         ",\"isa\":\"graph\",\"paths\":[\"graph\",\"eager\"],\"cpus\":1,\"device\":\"" + d.name + "\",\"arch\":\"" + d.arch +
         "\",\"multiprocessors\":" + std::to_string(d.multiprocessors) + ",\"memory_free\":" + text_of_bytes(memory.free) +
         ",\"memory_total\":" + text_of_bytes(memory.total) + "}";
}

GpuSession::GpuSession(std::shared_ptr<const GpuModel> model, int slots, int context, const char *path, const char *kv)
    : model_(std::move(model)),
      slots_(slots),
      context_(context),
      graphs_wanted_(wants_graphs(path)),
      form_(kv_store(kv)),
      most_((int)std::min<size_t>(kMostChunk, std::max<size_t>((size_t)slots * context, kMostDecode))),
      hidden_row_(round_up(model_->config().hidden_size, 16)),
      q_row_(round_up(model_->q_size(), 16)),
      inter_row_(round_up(model_->config().intermediate_size, 16)),
      qkv_row_((model_->config().num_heads + 2 * model_->config().num_kv_heads) * model_->config().head_dim),
      lengths_((size_t)slots, 0),
      status_(16, "the session"),
      inputs_((size_t)4 * kMostChunk * 4),
      outputs_((size_t)4 * (kMostChunk + 16)),
      head_(model_->head_weights(), HALO_AGAIN, status_.as<uint32_t>()) {
  const halo_config &c = model_->config();
  const KvShape shape = kv_shape(c, form_, context);
  const size_t heads = heads_of(shape, slots), group = (size_t)c.num_heads / c.num_kv_heads;
  const char *what = "the session";
  cache_ = DeviceBytes(heads * 2 * shape.half_bytes(), "the KV cache");
  if (form_ != KvStore::f16) cache_scales_ = DeviceBytes(heads * 2 * shape.room * 4, "the KV cache");
  partial_ = DeviceBytes((size_t)kMostDecode * c.num_kv_heads * (shape.room / kBlockOfKv) * group * (shape.width + 2) * 4, what);
  counts_ = DeviceBytes((size_t)kMostDecode * c.num_heads * 4, what);
  x_ = DeviceBytes((size_t)most_ * hidden_row_ * 4, what);
  qkv_ = DeviceBytes((size_t)most_ * qkv_row_ * 4, what);
  attended_ = DeviceBytes((size_t)most_ * q_row_ * 4, what);
  gate_ = DeviceBytes((size_t)most_ * inter_row_ * 4, what);
  int columns = 0;
  const GpuLayer &layer = model_->layers[0];
  for (const Matrix *m : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
    columns = std::max(columns, m->steps * step_cols(m->packing));
  q8_stride_ = round_up(columns, 64);
  q8_ = DeviceBytes((size_t)most_ * q8_stride_, what);
  q8_facts_ = DeviceBytes((size_t)most_ * 8, what);
  places_ = DeviceBytes((size_t)most_ * 8, what);
  ids_ = DeviceBytes((size_t)most_ * 4, what);
  rope_now_ = DeviceBytes((size_t)most_ * 2 * model_->host().rope_row * 4, what);
}

std::string GpuSession::facts() {
  return "{\"isa\":\"" + std::string(graphs_wanted_ ? "graph" : "eager") + "\",\"threads\":1,\"slots\":" +
         std::to_string(slots_) + ",\"context\":" + std::to_string(context_) + ",\"kv\":\"" + kv_name(form_) +
         "\",\"kv_bytes\":" + text_of_bytes(cache_.bytes() + cache_scales_.bytes()) + ",\"packing\":\"" +
         (model_->packing() == Packing::two_bits ? "two_bits" : "base_three") +
         "\",\"model_bytes\":" + text_of_bytes(model_->bytes()) + "}";
}

void GpuSession::run(const Batch &batch) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  check_batch(batch, model_->config(), slots_, context_, lengths_);
  kept_ = 0;
  size_t done = 0;
  for (int start = 0; start < batch.n;) {
    const int end = chunk_end(batch, start, most_), count = end - start;
    put_inputs(batch, start, count);
    int wanted = 0;
    for (int i = start; i < end; ++i)
      if (batch.want[i]) inputs_.host<int32_t>()[3 * kMostChunk + wanted++] = i - start;
    decode(batch, start, count, wanted, done);
    done += wanted;
    for (int i = start; i < end; ++i) lengths_[batch.slots[i]] = batch.positions[i] + 1;
    if (start == 0 && end == batch.n) kept_ = std::min(wanted, (int)HALO_AGAIN);
    start = end;
  }
}

// The chunk's entries to where the device reads them.
void GpuSession::put_inputs(const Batch &batch, int start, int count) {
  int32_t *in = inputs_.host<int32_t>();
  memcpy(in, batch.tokens + start, (size_t)count * 4);
  memcpy(in + kMostChunk, batch.slots + start, (size_t)count * 4);
  memcpy(in + 2 * kMostChunk, batch.positions + start, (size_t)count * 4);
  own_slots_ = true;
  for (int i = 0; i < count && own_slots_; ++i)
    for (int k = 0; k < i; ++k) own_slots_ &= batch.slots[start + i] != batch.slots[start + k];
}

// One chunk: its layers, and what of it is wanted. Results are the caller's when it returns.
void GpuSession::decode(const Batch &batch, int start, int count, int wanted, size_t done) {
  const bool greedy = !batch.draw && !batch.logits;
  if (greedy && wanted == count && count <= kMostDecode && own_slots_) {
    if (graphs_wanted_) {
      Graph &graph = graphs_[count];
      if (!graph) graph = stream_.capture([&] {
        put_layers(count);
        put_argmax(count);
      });
      stream_.run(graph);
    } else {
      put_layers(count);
      put_argmax(count);
    }
    settle(batch);
    memcpy(batch.ids + done, outputs_.host<int32_t>() + 16, (size_t)count * 4);
    return;
  }
  if (count > kMostDecode) {
    tiles_ = plan_prefill(batch.slots + start, batch.positions + start, count,
                          model_->config().num_heads / model_->config().num_kv_heads);
    if (!prefill_tiles_.bytes()) prefill_tiles_ = DeviceBytes((size_t)most_ * sizeof(PrefillTile), "the session");
    stream_.copy_in(prefill_tiles_.as<>(), tiles_.data(), tiles_.size() * sizeof(PrefillTile));
  }
  put_layers(count);
  results(batch, wanted, done);
}

// Waits for the device, and looks at what it says.
void GpuSession::settle(const Batch &batch) {
  stream_.sync();
  if (outputs_.host<uint32_t>()[0] == 0) return;
  for (int i = 0; i < batch.n; ++i) lengths_[batch.slots[i]] = std::min(lengths_[batch.slots[i]], batch.positions[i]);
  throw Failure(HALO_NUMERIC, "an activation is not finite: the model's weights are damaged");
}

void GpuSession::put_argmax(int count) {
  head_.put_argmax(x_.as<float>(), hidden_row_, inputs_.device<int32_t>() + 3 * kMostChunk, count, ids_.as<int32_t>(), stream_);
  put_publish(count);
}

// The status, and the ids of `count` wanted entries, to the host.
void GpuSession::put_publish(int count) {
  launch_publish({ids_.as<int32_t>(), status_.as<uint32_t>(), count, outputs_.device<int32_t>() + 16,
                  outputs_.device<uint32_t>()},
                 stream_);
}

// What is wanted of a chunk whose layers are on their way.
void GpuSession::results(const Batch &batch, int wanted, size_t done) {
  const size_t vocab = (size_t)model_->config().vocab_size;
  if (batch.draw) {
    draw(*batch.draw, wanted, done);
  } else if (batch.logits) {
    all_logits(batch.logits + done * vocab, wanted);
  } else {
    const int32_t *rows = inputs_.device<int32_t>() + 3 * kMostChunk;
    for (int first = 0; first < wanted; first += HALO_AGAIN)
      head_.put_argmax(x_.as<float>(), hidden_row_, rows + first, std::min(wanted - first, HALO_AGAIN),
                       ids_.as<int32_t>() + first, stream_);
    put_publish(wanted);
    settle(batch);
    if (wanted) memcpy(batch.ids + done, outputs_.host<int32_t>() + 16, (size_t)wanted * 4);
    return;
  }
  put_publish(0);
  settle(batch);
}

void GpuSession::all_logits(float *logits, int wanted) {
  const size_t vocab = (size_t)model_->config().vocab_size;
  const int32_t *rows = inputs_.device<int32_t>() + 3 * kMostChunk;
  for (int first = 0; first < wanted; first += HALO_AGAIN) {
    const int count = std::min(wanted - first, HALO_AGAIN);
    if (logits_.bytes() < count * vocab * 4) {
      stream_.sync();  // the old ones may still be copied
      logits_ = DeviceBytes(count * vocab * 4, "the logits");
    }
    head_.put_logits(x_.as<float>(), hidden_row_, rows + first, count, logits_.as<float>(), stream_);
    stream_.copy_out(logits + (size_t)first * vocab, logits_.as<>(), count * vocab * 4);
  }
}

// Noise goes in and what is near comes out by copies: these batches are not in a graph.
void GpuSession::draw(const Draw &d, int wanted, size_t done) {
  for (int first = 0; first < wanted; first += HALO_AGAIN) {
    const int count = std::min(wanted - first, HALO_AGAIN);
    const size_t vocab = (size_t)model_->config().vocab_size, at = done + first, near = (size_t)count * d.room;
    const size_t words = count * vocab + 1 + 2 * (size_t)count + 2 * near;
    if (draw_.bytes() < words * 4) {
      stream_.sync();
      draw_ = DeviceBytes(words * 4, "the draws");
    }
    float *noise = draw_.as<float>(), *depth = noise + count * vocab;
    int32_t *winners = (int32_t *)(depth + 1), *found = winners + count, *ids = found + count;
    float *logits = (float *)(ids + near);
    stream_.copy_in(noise, d.noise + at * vocab, count * vocab * 4);
    stream_.copy_in(depth, &d.depth, 4);
    head_.put_draw(x_.as<float>(), hidden_row_, inputs_.device<int32_t>() + 3 * kMostChunk + first, count,
                   {noise, depth, (int)d.room, winners, found, ids, logits}, stream_);
    stream_.copy_out(d.winners + at, winners, (size_t)count * 4);
    stream_.copy_out(d.found + at, found, (size_t)count * 4);
    if (!near) continue;
    stream_.copy_out(d.ids + at * d.room, ids, near * 4);
    stream_.copy_out(d.logits + at * d.room, logits, near * 4);
  }
}

void GpuSession::logits_again(int k, float *logits, size_t count) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  if (k < 0 || k >= kept_) throw Failure(HALO_INVALID, "the last run left %d hidden states, there is no number %d", kept_, k);
  const size_t vocab = (size_t)model_->config().vocab_size;
  if (count < vocab) throw Failure(HALO_INVALID, "a row of logits does not fit into room for %zu floats", count);
  if (logits_.bytes() < vocab * 4) logits_ = DeviceBytes(vocab * 4, "the logits");
  head_.put_logits_again(k, logits_.as<float>(), stream_);
  stream_.copy_out(logits, logits_.as<>(), vocab * 4);
  put_publish(0);
  stream_.sync();
  if (outputs_.host<uint32_t>()[0]) throw Failure(HALO_NUMERIC, "a logit is not finite: the model's weights are damaged");
}

// Whole blocks of 32 positions: every form keeps these together, rotor3 in two places (its bits of two, and of one).
void GpuSession::copy(int from, int to, int length) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  check_copy(from, to, length, lengths_);
  const KvShape shape = kv_shape(model_->config(), form_, context_);
  const size_t rows = heads_of(shape, 1) * 2, half = shape.half_bytes(), whole = (size_t)shape.room * shape.width;
  const size_t positions = round_up(length, 32), words = form_ == KvStore::rotor3 ? whole / 4 : half;
  const uint8_t *source = cache_.as<uint8_t>() + from * rows * half;
  uint8_t *target = cache_.as<uint8_t>() + to * rows * half;
  lengths_[to] = 0;  // should a copy fail
  if (length) {
    stream_.copy_rows(target, source, half, words / shape.room * positions, rows);
    if (form_ == KvStore::rotor3)
      stream_.copy_rows(target + words, source + words, half, whole / 8 / shape.room * positions, rows);
    if (form_ != KvStore::f16)
      stream_.copy_rows(cache_scales_.as<float>() + to * rows * shape.room, cache_scales_.as<float>() + from * rows * shape.room,
                        (size_t)shape.room * 4, (size_t)length * 4, rows);
    stream_.sync();
  }
  lengths_[to] = length;
}

void GpuSession::put_layers(int count) {
  const halo_config &c = model_->config();
  const int32_t *in = inputs_.device<int32_t>();
  const Rows &rows = model_->embedding;
  launch_embed({rows.data, rows.row_bytes, rows.bf16, c.hidden_size, hidden_row_,
                {in, in + kMostChunk, in + 2 * kMostChunk}, x_.as<float>(), places_.as<int32_t>(),
                places_.as<int32_t>() + most_, model_->rope_cos, model_->rope_sin, model_->host().rope_row,
                rope_now_.as<float>()},
               count, stream_);
  for (int index = 0; index < c.num_layers; ++index) {
    const GpuLayer &layer = model_->layers[index];
    if (count <= kMostDecode) {
      put_decode_layer(layer, index, count);
    } else {
      put_prefill_layer(layer, index, count);
    }
  }
}

AttentionArgs GpuSession::attention_args(int index, int count) const {
  const halo_config &c = model_->config();
  const KvShape shape = kv_shape(c, form_, context_);
  AttentionArgs a = {};
  a.qkv = qkv_.as<float>();
  a.qkv_stride = qkv_row_;
  a.slots = places_.as<int32_t>();
  a.positions = places_.as<int32_t>() + most_;
  a.tokens = count, a.layer = index, a.heads = c.num_heads, a.append = own_slots_;
  a.kv = {cache_.as<uint8_t>(), cache_scales_.as<float>(), shape.half_bytes(), shape.layers, shape.kv_heads,
          shape.head_dim, shape.width, shape.room};
  a.rope_cos = model_->rope_cos, a.rope_sin = model_->rope_sin, a.rope_row = model_->host().rope_row;
  a.rope_now = rope_now_.as<float>();
  a.scale = (float)(1.0 / sqrt((double)c.head_dim));
  a.out = attended_.as<float>();
  a.out_stride = q_row_;
  a.partial = partial_.as<float>();
  a.counts = counts_.as<int32_t>();
  a.blocks = shape.room / kBlockOfKv;
  a.status = status_.as<uint32_t>();
  return a;
}

void GpuSession::put_norm(const float *x, int stride, const float *norm, int n, const Matrix &next, int count) {
  NormArgs a = {x, stride, norm, n, model_->config().rms_norm_eps,
                {q8_.as<int8_t>(), q8_facts_.as<float>(), q8_facts_.as<int32_t>() + most_, q8_stride_},
                next.steps * step_cols(next.packing), status_.as<uint32_t>()};
  launch_norm(a, count, stream_);
}

// One token goes through norm and quantisation inside of the product, several before it.
void GpuSession::put_product(const Matrix &m, const float *x, const float *norm, int count, float *out, int out_stride,
                             Epilogue epilogue) {
  ProductArgs a = {};
  a.tiles = (const uint4 *)m.tiles;
  a.weight_scale = m.scales;
  a.rows = m.rows, a.tile_count = m.tile_count, a.steps = m.steps;
  a.n = m.cols, a.eps = model_->config().rms_norm_eps;
  a.tokens = count, a.out_stride = out_stride, a.activation = model_->config().activation, a.epilogue = epilogue;
  a.out = out;
  a.status = status_.as<uint32_t>();
  if (count == 1) {
    a.x = x, a.norm = norm;
  } else {
    a.q = {q8_.as<int8_t>(), q8_facts_.as<float>(), q8_facts_.as<int32_t>() + most_, q8_stride_};
  }
  if (count > kMostDecode) {
    launch_gemm({m.tiles, m.scales, m.rows, m.tile_count, m.steps, a.q, count, out_stride, epilogue, a.activation, out},
                m.packing, stream_);
  } else {
    launch_product(a, m.packing, stream_);
  }
}

void GpuSession::put_decode_layer(const GpuLayer &layer, int index, int count) {
  const halo_config &c = model_->config();
  float *x = x_.as<float>(), *qkv = qkv_.as<float>(), *attended = attended_.as<float>(), *gate = gate_.as<float>();
  const bool several = count > 1;
  if (several) put_norm(x, hidden_row_, layer.input_norm, c.hidden_size, layer.qkv, count);
  put_product(layer.qkv, x, layer.input_norm, count, qkv, qkv_row_, kStore);
  AttentionArgs attention = attention_args(index, count);
  if (!own_slots_) launch_append(attention, form_, stream_);
  launch_attention(attention, form_, stream_);
  if (several) put_norm(attended, q_row_, layer.attn_sub_norm, model_->q_size(), layer.o, count);
  put_product(layer.o, attended, layer.attn_sub_norm, count, x, hidden_row_, kAdd);
  if (several) put_norm(x, hidden_row_, layer.post_attn_norm, c.hidden_size, layer.gate_up, count);
  put_product(layer.gate_up, x, layer.post_attn_norm, count, gate, inter_row_, kGated);
  if (several) put_norm(gate, inter_row_, layer.ffn_sub_norm, c.intermediate_size, layer.down, count);
  put_product(layer.down, gate, layer.ffn_sub_norm, count, x, hidden_row_, kAdd);
}

void GpuSession::put_prefill_layer(const GpuLayer &layer, int index, int count) {
  const halo_config &c = model_->config();
  float *x = x_.as<float>(), *qkv = qkv_.as<float>(), *attended = attended_.as<float>(), *gate = gate_.as<float>();
  put_norm(x, hidden_row_, layer.input_norm, c.hidden_size, layer.qkv, count);
  put_product(layer.qkv, x, nullptr, count, qkv, qkv_row_, kStore);
  AttentionArgs attention = attention_args(index, count);
  launch_append(attention, form_, stream_);
  PrefillAttentionArgs prefill = {};
  prefill.base = attention;
  prefill.tiles = prefill_tiles_.as<PrefillTile>();
  prefill.tile_count = (int)tiles_.size();
  launch_prefill_attention(prefill, form_, stream_);
  put_norm(attended, q_row_, layer.attn_sub_norm, model_->q_size(), layer.o, count);
  put_product(layer.o, attended, nullptr, count, x, hidden_row_, kAdd);
  put_norm(x, hidden_row_, layer.post_attn_norm, c.hidden_size, layer.gate_up, count);
  put_product(layer.gate_up, x, nullptr, count, gate, inter_row_, kGated);
  put_norm(gate, inter_row_, layer.ffn_sub_norm, c.intermediate_size, layer.down, count);
  put_product(layer.down, gate, nullptr, count, x, hidden_row_, kAdd);
}

void ternary_sums(const char *path, const uint8_t *codes, int rows, int cols, const int8_t *x, int tokens, int32_t *sums) {
  if (cols > 131072) throw Failure(HALO_UNSUPPORTED, "sums of %d columns are more than a float holds exactly", cols);
  Packing packing = Packing::two_bits;
  if (path && !strcmp(path, "base_three")) packing = Packing::base_three;
  else if (path && strcmp(path, "two_bits") && strcmp(path, "graph") && strcmp(path, "eager"))
    throw Failure(HALO_INVALID, "'%.40s' is no packing; there are two_bits and base_three", path);
  const int step = step_cols(packing), tile_count = (rows + kTileRows - 1) / kTileRows, steps = (cols + step - 1) / step;
  const int stride = round_up(steps * step, 64);
  const size_t source = (size_t)(round_up(rows, 16) / 16) * (round_up(cols, 96) / 96) * 320;
  Stream stream;
  DeviceBytes from(source, "a product"), tiles((size_t)tile_count * steps * kStepBytes, "a product"),
      ones((size_t)rows * 4, "a product"), q((size_t)kMostDecode * stride, "a product"),
      facts((size_t)kMostDecode * 8, "a product"), out((size_t)kMostDecode * rows * 4, "a product"), status(16, "a product");
  stream.copy_in(from.as<>(), codes, source);
  RepackArgs repack = {from.as<>(), nullptr, nullptr, rows, 0, 0, rows, cols, tile_count, steps, tiles.as<uint32_t>()};
  launch_repack(repack, packing, stream);
  std::vector<float> one((size_t)rows, 1.0f), got((size_t)kMostDecode * rows);
  stream.copy_in(ones.as<>(), one.data(), one.size() * 4);
  for (int first = 0; first < tokens; first += kMostDecode) {
    const int count = std::min(kMostDecode, tokens - first);
    std::vector<int8_t> rows8((size_t)kMostDecode * stride, 0);
    std::vector<float> scales(kMostDecode, 1.0f);
    std::vector<int32_t> offsets(kMostDecode, 0);
    for (int t = 0; t < count; ++t) {
      memcpy(&rows8[(size_t)t * stride], x + (size_t)(first + t) * cols, (size_t)cols);
      for (int j = 0; j < cols; ++j) offsets[t] += x[(size_t)(first + t) * cols + j];
    }
    stream.copy_in(q.as<>(), rows8.data(), rows8.size());
    stream.copy_in(facts.as<>(), scales.data(), scales.size() * 4);
    stream.copy_in(facts.as<float>() + kMostDecode, offsets.data(), offsets.size() * 4);
    ProductArgs a = {};
    a.tiles = tiles.as<uint4>();
    a.weight_scale = ones.as<float>();
    a.rows = rows, a.tile_count = tile_count, a.steps = steps, a.n = cols, a.tokens = count, a.out_stride = rows;
    a.q = {q.as<int8_t>(), facts.as<float>(), facts.as<int32_t>() + kMostDecode, stride};
    a.out = out.as<float>();
    a.status = status.as<uint32_t>();
    launch_product(a, packing, stream);
    stream.copy_out(got.data(), out.as<>(), (size_t)count * rows * 4);
    stream.sync();
    for (size_t i = 0; i < (size_t)count * rows; ++i) sums[(size_t)first * rows + i] = (int32_t)got[i];
  }
}

}  // namespace halo
