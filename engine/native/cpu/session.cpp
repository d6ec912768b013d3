// The forward pass. A batch is cut into chunks of kChunk tokens; a chunk goes through all layers, each phase of a
// layer spread over the pool. No phase's result depends on how it is cut or spread: that is what makes prefill equal
// to decode, and one slot's tokens independent of the others'.
#include "session.h"

#include <fenv.h>
#include <string.h>

#include <algorithm>

namespace halo {
namespace {

const int kChunk = 32;  // tokens that share one pass over the weights
const int kBlock = 64;  // rows of a matrix in one item of work

int blocks_of(int rows) { return (rows + kBlock - 1) / kBlock; }

float from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

bool finite_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits & 0x7fffffffu) < 0x7f800000u;
}

// Round to nearest, and no flushing of subnormals: a host program may have set either otherwise.
class DefaultRounding {
 public:
  DefaultRounding() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultRounding() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
};

}  // namespace

Session::Session(std::shared_ptr<const Model> model, int slots, int context, int threads, const Kernels &kernels,
                 KvForm kv)
    : model_(std::move(model)),
      kernels_(kernels),
      slots_(slots),
      context_(context),
      head_dim_(model_->head_dim()),
      hidden_row_(round_up(model_->config.hidden_size, 16)),
      inter_row_(round_up(model_->config.intermediate_size, 16)),
      qkv_row_((model_->config.num_heads + 2 * model_->config.num_kv_heads) * head_dim_),
      quant_row_(round_up(std::max(hidden_row_, inter_row_), 64) + 64),
      pool_(threads),
      lengths_((size_t)slots, 0),
      attention_({model_->config.num_layers, model_->config.num_heads, model_->config.num_kv_heads, head_dim_, slots,
                  context, kChunk},
                 kv,
                 {model_->rope_cos, model_->rope_sin, model_->rope_row}, *kernels.attention, pool_),
      x_(kChunk, hidden_row_),
      normed_(kChunk, std::max(hidden_row_, inter_row_)),
      qkv_(kChunk, qkv_row_),
      attended_(kChunk, hidden_row_),
      gate_(kChunk, inter_row_),
      up_(kChunk, inter_row_),
      quantized_(kChunk, quant_row_),
      scales_(kChunk, 1),
      best_((size_t)blocks_of(model_->config.vocab_size), kChunk),
      sums_(kChunk, 1),
      best_ids_((size_t)blocks_of(model_->config.vocab_size), kChunk) {}

std::string Session::facts() {
  char text[256];
  snprintf(text, sizeof text, "{\"isa\":\"%s\",\"threads\":%d,\"slots\":%d,\"context\":%d,\"kv\":\"%s\",\"kv_bytes\":%zu}",
           kernels_.name, pool_.threads(), slots_, context_, attention_.form(), attention_.bytes());
  return text;
}

void Session::check(const Batch &batch) const {
  std::vector<int32_t> lengths = lengths_;
  size_t wanted = 0;
  for (int i = 0; i < batch.n; ++i) {
    int token = batch.tokens[i], slot = batch.slots[i], position = batch.positions[i];
    if (token < 0 || token >= model_->config.vocab_size)
      throw Failure(HALO_INVALID, "entry %d: token %d is outside the vocabulary of %d", i, token,
                    model_->config.vocab_size);
    if (slot < 0 || slot >= slots_)
      throw Failure(HALO_INVALID, "entry %d: slot %d is outside the session's %d slots", i, slot, slots_);
    if (position < 0 || position >= context_)
      throw Failure(HALO_INVALID, "entry %d: position %d is outside the context of %d tokens", i, position, context_);
    if (position > lengths[slot])
      throw Failure(HALO_INVALID, "entry %d: position %d would leave a gap, slot %d holds %d tokens", i, position, slot,
                    lengths[slot]);
    lengths[slot] = position + 1;
    wanted += batch.want[i] != 0;
  }
  if (batch.logits && wanted > batch.logits_count / (size_t)model_->config.vocab_size)
    throw Failure(HALO_INVALID, "%zu rows of logits do not fit into room for %zu floats", wanted, batch.logits_count);
  if (batch.ids && wanted > batch.ids_count)
    throw Failure(HALO_INVALID, "%zu ids do not fit into room for %zu", wanted, batch.ids_count);
}

void Session::run(const Batch &batch) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  check(batch);
  DefaultRounding rounding;
  not_finite_ = false;
  size_t done = 0;
  for (int start = 0; start < batch.n;) {
    int end = chunk_end(batch, start);
    forward(batch, start, end);
    int wanted = gather_wanted(batch, start, end);
    if (wanted) head(batch, wanted, done);
    done += wanted;
    for (int i = start; i < end; ++i) lengths_[batch.slots[i]] = batch.positions[i] + 1;
    start = end;
    if (not_finite_) {
      for (int i = 0; i < batch.n; ++i)
        lengths_[batch.slots[i]] = std::min(lengths_[batch.slots[i]], batch.positions[i]);
      throw Failure(HALO_NUMERIC, "an activation is not finite: the model's weights are damaged");
    }
  }
}

// A chunk ends where a slot is rewound: its keys up to there are still needed by the tokens before.
int Session::chunk_end(const Batch &batch, int start) const {
  int end = start;
  for (; end < batch.n && end - start < kChunk; ++end)
    for (int i = start; i < end; ++i)
      if (batch.slots[i] == batch.slots[end] && batch.positions[i] >= batch.positions[end]) return end;
  return end;
}

void Session::forward(const Batch &batch, int start, int end) {
  int count = end - start;
  embed(batch.tokens + start, count);
  for (int index = 0; index < model_->config.num_layers; ++index) {
    attention(index, batch, start, count);
    feed_forward(index, count);
  }
}

void Session::embed(const int32_t *tokens, int count) {
  for (int t = 0; t < count; ++t) {
    const uint8_t *row = model_->embedding + tokens[t] * model_->embedding_row_bytes;
    float *x = &x_[(size_t)t * hidden_row_];
    if (!model_->embedding_bf16) {
      memcpy(x, row, (size_t)hidden_row_ * 4);
      continue;
    }
    const uint16_t *halves = (const uint16_t *)row;
    for (int i = 0; i < hidden_row_; ++i) x[i] = from_bf16(halves[i]);
  }
}

void Session::attention(int index, const Batch &batch, int start, int count) {
  const Layer &layer = model_->layers[index];
  const halo_config &c = model_->config;
  norm_and_quantize(x_.get(), hidden_row_, layer.input_norm, c.hidden_size, count);
  float *k = qkv_.get() + c.num_heads * head_dim_, *v = k + c.num_kv_heads * head_dim_;
  const Product qkv[] = {{&layer.q, qkv_.get(), qkv_row_, false}, {&layer.k, k, qkv_row_, false},
                         {&layer.v, v, qkv_row_, false}};
  multiply(qkv, 3, count);
  if (!attention_.run(index, qkv_.get(), qkv_row_, batch.slots + start, batch.positions + start, count,
                      attended_.get(), hidden_row_))
    not_finite_ = true;
  norm_and_quantize(attended_.get(), hidden_row_, layer.attn_sub_norm, c.hidden_size, count);
  const Product o = {&layer.o, x_.get(), hidden_row_, true};
  multiply(&o, 1, count);
}

void Session::feed_forward(int index, int count) {
  const Layer &layer = model_->layers[index];
  const halo_config &c = model_->config;
  norm_and_quantize(x_.get(), hidden_row_, layer.post_attn_norm, c.hidden_size, count);
  const Product gate_up[] = {{&layer.gate, gate_.get(), inter_row_, false}, {&layer.up, up_.get(), inter_row_, false}};
  multiply(gate_up, 2, count);
  pool_.each(count, [&](int t, int) {
    float *gate = &gate_[(size_t)t * inter_row_];
    kernels_.relu2(gate, &up_[(size_t)t * inter_row_], inter_row_, gate);
  });
  norm_and_quantize(gate_.get(), inter_row_, layer.ffn_sub_norm, c.intermediate_size, count);
  const Product down = {&layer.down, x_.get(), hidden_row_, true};
  multiply(&down, 1, count);
}

void Session::norm_and_quantize(const float *x, int stride, const float *weight, int n, int count) {
  pool_.each(count, [&](int t, int) {
    float *y = &normed_[(size_t)t * std::max(hidden_row_, inter_row_)];
    kernels_.rmsnorm(x + (size_t)t * stride, weight, n, model_->config.rms_norm_eps, y);
    quantize_token(t, y, n);
  });
}

void Session::quantize_token(int t, const float *x, int n) {
  int8_t *q = &quantized_[(size_t)t * quant_row_];
  int lanes = round_up(n, 16), row = round_up(n, 64);
  if (!kernels_.quantize(x, lanes, q, &scales_[t])) {
    not_finite_ = true;
    memset(q, 0, (size_t)lanes);
    scales_[t] = 1.0f;
  }
  memset(q + lanes, 0, (size_t)(row - lanes));
  int32_t sum = 0;
  for (int i = 0; i < lanes; ++i) sum += q[i];
  sums_[t] = sum;
}

void Session::multiply(const Product *products, int product_count, int count) {
  int items = 0;
  for (int p = 0; p < product_count; ++p) items += blocks_of(products[p].w->rows);
  pool_.each(items, [&](int item, int) {
    const Product *product = products;
    while (item >= blocks_of(product->w->rows)) item -= blocks_of((product++)->w->rows);
    multiply_block(*product, item * kBlock, count);
  });
}

// The codes are weight + 1, so the sum of the activations comes off once a row.
void Session::multiply_block(const Product &product, int first, int count) {
  const Ternary &w = *product.w;
  int rows = std::min(kBlock, w.rows - first);
  int32_t sums[kChunk * kBlock];
  kernels_.ternary(w.codes + (size_t)first * w.row_bytes, w.row_bytes, rows, quantized_.get(), (size_t)quant_row_,
                   count, sums, kBlock);
  for (int t = 0; t < count; ++t) {
    float *out = product.out + (size_t)t * product.stride + first;
    float scale = scales_[t];
    int32_t offset = sums_[t];
    for (int r = 0; r < rows; ++r) {
      float y = (float)(sums[t * kBlock + r] - offset) * w.scales[first + r] / scale;
      out[r] = product.add ? out[r] + y : y;
    }
  }
}

// Norms the rows whose logits are wanted, moved together at the front of normed_; how many there are.
int Session::gather_wanted(const Batch &batch, int start, int end) {
  int wanted = 0;
  for (int i = start; i < end; ++i) {
    if (!batch.want[i]) continue;
    kernels_.rmsnorm(&x_[(size_t)(i - start) * hidden_row_], model_->final_norm, model_->config.hidden_size,
                     model_->config.rms_norm_eps, &normed_[(size_t)wanted * hidden_row_]);
    ++wanted;
  }
  return wanted;
}

void Session::head(const Batch &batch, int wanted, size_t done) {
  int vocab = model_->config.vocab_size, blocks = blocks_of(vocab);
  float *logits = batch.logits ? batch.logits + done * (size_t)vocab : nullptr;
  pool_.each(blocks, [&](int block, int) { head_block(block, wanted, logits); });
  if (logits) return;
  for (int t = 0; t < wanted; ++t) {
    int best = 0;
    for (int block = 1; block < blocks; ++block)
      if (best_[(size_t)block * kChunk + t] > best_[(size_t)best * kChunk + t]) best = block;
    batch.ids[done + t] = best_ids_[(size_t)best * kChunk + t];
  }
}

void Session::head_block(int block, int wanted, float *logits) {
  int first = block * kBlock, rows = std::min(kBlock, model_->config.vocab_size - first);
  const uint8_t *weights = model_->embedding + (size_t)first * model_->embedding_row_bytes;
  for (int t = 0; t < wanted; ++t) {
    float own[kBlock];
    float *out = logits ? logits + (size_t)t * model_->config.vocab_size + first : own;
    kernels_.dot_rows(weights, model_->embedding_row_bytes, model_->embedding_bf16, rows,
                      &normed_[(size_t)t * hidden_row_], hidden_row_, out);
    int best = 0;
    for (int r = 0; r < rows; ++r) {
      if (out[r] > out[best]) best = r;
      if (!finite_bits(out[r])) not_finite_ = true;
    }
    best_[(size_t)block * kChunk + t] = out[best];
    best_ids_[(size_t)block * kChunk + t] = first + best;
  }
}

}  // namespace halo
