// The forward pass. A batch is cut into chunks of kChunk tokens; a chunk goes through all layers, each phase of a
// layer spread over the pool. No phase's result depends on how it is cut or spread: that is what makes prefill equal
// to decode, and one slot's tokens independent of the others'.
#include "session.h"

#include <fenv.h>
#include <string.h>

#include <algorithm>

namespace halo {
namespace {

const int kChunk = HALO_AGAIN;  // tokens that share one pass over the weights: whole tiles, whose activations L2 can hold

float from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
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
      hidden_row_(round_up(model_->config.hidden_size, 16)),
      q_row_(round_up(model_->q_size(), 16)),
      inter_row_(round_up(model_->config.intermediate_size, 16)),
      qkv_row_((model_->config.num_heads + 2 * model_->config.num_kv_heads) * model_->head_dim()),
      pool_(threads),
      lengths_((size_t)slots, 0),
      attention_({model_->config.num_layers, model_->config.num_heads, model_->config.num_kv_heads, model_->head_dim(),
                  slots, context, kChunk},
                 kv,
                 {model_->rope_cos, model_->rope_sin, model_->rope_row}, *kernels.attention, pool_),
      quantized_(kChunk, std::max({hidden_row_, q_row_, inter_row_}), kernels, pool_),
      head_(*model_, kernels, pool_),
      x_(kChunk, hidden_row_),
      normed_(kChunk, hidden_row_),
      qkv_(kChunk, qkv_row_),
      attended_(kChunk, q_row_),
      gate_(kChunk, inter_row_),
      up_(kChunk, inter_row_) {}

std::string Session::facts() {
  char text[256];
  snprintf(text, sizeof text, "{\"isa\":\"%s\",\"threads\":%d,\"slots\":%d,\"context\":%d,\"kv\":\"%s\",\"kv_bytes\":%zu}",
           kernels_.name, pool_.threads(), slots_, context_, attention_.form(), attention_.bytes());
  return text;
}

void Session::run(const Batch &batch) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  check_batch(batch, model_->config, slots_, context_, lengths_);
  DefaultRounding rounding;
  not_finite_ = false;
  kept_ = 0;
  size_t done = 0;
  for (int start = 0; start < batch.n;) {
    int end = chunk_end(batch, start, kChunk);
    forward(batch, start, end);
    int wanted = gather_wanted(batch, start, end);
    if (wanted) head(batch, wanted, done);
    done += wanted;
    for (int i = start; i < end; ++i) lengths_[batch.slots[i]] = batch.positions[i] + 1;
    bool first = start == 0;
    start = end;
    if (not_finite_) {
      for (int i = 0; i < batch.n; ++i)
        lengths_[batch.slots[i]] = std::min(lengths_[batch.slots[i]], batch.positions[i]);
      throw Failure(HALO_NUMERIC, "an activation is not finite: the model's weights are damaged");
    }
    if (first && end == batch.n) kept_ = wanted;
  }
}

void Session::logits_again(int k, float *logits, size_t count) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  if (k < 0 || k >= kept_) throw Failure(HALO_INVALID, "the last run left %d hidden states, there is no number %d", kept_, k);
  if (count < (size_t)model_->config.vocab_size)
    throw Failure(HALO_INVALID, "a row of logits does not fit into room for %zu floats", count);
  DefaultRounding rounding;
  if (!head_.all(&normed_[(size_t)k * hidden_row_], hidden_row_, 1, logits))
    throw Failure(HALO_NUMERIC, "a logit is not finite: the model's weights are damaged");
}

void Session::copy(int from, int to, int length) {
  std::unique_lock<std::mutex> lock(running_, std::try_to_lock);
  if (!lock.owns_lock()) throw Failure(HALO_BUSY, "the session is running in another thread");
  check_copy(from, to, length, lengths_);
  attention_.copy(from, to, length);
  lengths_[to] = length;
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
    const uint8_t *row = model_->embedding.row(tokens[t]);
    float *x = &x_[(size_t)t * hidden_row_];
    if (!model_->embedding.bf16) {
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
  quantize(x_.get(), hidden_row_, layer.input_norm, c.hidden_size, count);
  float *k = qkv_.get() + model_->q_size(), *v = k + c.num_kv_heads * model_->head_dim();
  const Product qkv[] = {{&layer.q, qkv_.get(), qkv_row_, false}, {&layer.k, k, qkv_row_, false},
                         {&layer.v, v, qkv_row_, false}};
  quantized_.multiply(qkv, 3);
  if (!attention_.run(index, qkv_.get(), qkv_row_, batch.slots + start, batch.positions + start, count, attended_.get(),
                      q_row_))
    not_finite_ = true;
  quantize(attended_.get(), q_row_, layer.attn_sub_norm, model_->q_size(), count);
  const Product o = {&layer.o, x_.get(), hidden_row_, true};
  quantized_.multiply(&o, 1);
}

void Session::feed_forward(int index, int count) {
  const Layer &layer = model_->layers[index];
  const halo_config &c = model_->config;
  quantize(x_.get(), hidden_row_, layer.post_attn_norm, c.hidden_size, count);
  const Product gate_up[] = {{&layer.gate, gate_.get(), inter_row_, false}, {&layer.up, up_.get(), inter_row_, false}};
  quantized_.multiply(gate_up, 2);
  auto activate = c.activation ? kernels_.silu : kernels_.relu2;
  pool_.each(count, [&](int t, int) {
    float *gate = &gate_[(size_t)t * inter_row_];
    activate(gate, &up_[(size_t)t * inter_row_], inter_row_, gate);
  });
  quantize(gate_.get(), inter_row_, layer.ffn_sub_norm, c.intermediate_size, count);
  const Product down = {&layer.down, x_.get(), hidden_row_, true};
  quantized_.multiply(&down, 1);
}

void Session::quantize(const float *x, int stride, const float *norm, int n, int count) {
  if (!quantized_.take(x, stride, norm, n, model_->config.rms_norm_eps, count)) not_finite_ = true;
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
  const size_t vocab = (size_t)model_->config.vocab_size;
  bool finite;
  if (batch.draw) {
    const Draw &d = *batch.draw;
    size_t near = done * d.room;
    finite = head_.draw(normed_.get(), hidden_row_, wanted,
                        {d.noise + done * vocab, d.depth, d.room, d.winners + done, d.found + done,
                         d.room ? d.ids + near : nullptr, d.room ? d.logits + near : nullptr});
  } else if (batch.logits) {
    finite = head_.all(normed_.get(), hidden_row_, wanted, batch.logits + done * vocab);
  } else {
    finite = head_.largest(normed_.get(), hidden_row_, wanted, nullptr, batch.ids + done);
  }
  if (!finite) not_finite_ = true;
}

}  // namespace halo
