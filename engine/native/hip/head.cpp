// The output head's host side: its memory, and what is launched for which call. No device code.
#include "head.h"

#include <string.h>

#include <algorithm>
#include <initializer_list>

#include "../cpu/failure.h"
#include "../cpu/kernels.h"

namespace halo {
namespace {

const size_t kPiece = (size_t)4 << 20;  // of the file that is on its way to the device
const int kCoarseBlocks = 2, kExactBlocks = 2, kLogitsBlocks = 4;  // on a multiprocessor: about what fits there at once

int blocks_for(int rows, int each, int on_one) {
  return std::max(1, std::min((rows + each - 1) / each, device().multiprocessors * on_one));
}

int steps_for(int hidden) { return (hidden + kHeadStepCols - 1) / kHeadStepCols; }

// The most tokens of these whose pass fits into a block; one always does.
int largest_pass(std::initializer_list<int> tokens, size_t (*shared)(int, int), int hidden) {
  for (int some : tokens)
    if (shared(hidden, some) <= device().shared_bytes) return some;
  return 1;
}

// Cuts one allocation into arrays that begin at multiples of 256 bytes.
class Cut {
 public:
  explicit Cut(uint8_t *from) : from_(from) {}
  template <class T>
  T *take(size_t count) {
    T *own = (T *)(from_ + at_);
    at_ += (count * sizeof(T) + 255) / 256 * 256;
    return from_ ? own : nullptr;
  }
  size_t bytes() const { return at_; }

 private:
  uint8_t *from_;
  size_t at_ = 0;
};

}  // namespace

HeadWeights::HeadWeights(const Model &model, const HeadRows &full, Stream &stream)
    : rows(full),
      vocab(model.config.vocab_size),
      hidden(model.config.hidden_size),
      steps(steps_for(hidden)),
      tile_count(round_up(vocab, kRows) / 8),
      eps(model.config.rms_norm_eps) {
  size_t need = std::max({head_norm_shared(hidden), head_coarse_shared(hidden, 1), head_exact_shared(hidden),
                          head_logits_shared(hidden, 1)});
  if (need > device().shared_bytes)
    throw Failure(HALO_UNSUPPORTED, "a hidden size of %d needs %zu bytes of a GPU block's memory, which has %zu",
                  hidden, need, device().shared_bytes);
  tiles_ = DeviceBytes((size_t)tile_count * steps * kHeadStepWords * 16, "the coarse head");
  facts_ = DeviceBytes((size_t)tile_count * 8 * 16, "the coarse head's bounds");
  norm_ = DeviceBytes((size_t)round_up(hidden, 16) * 4, "the final norm");
  upload_tiles(model, stream);
  upload_facts(model.coarse, stream);
  SharedBytes norm_piece(norm_.bytes());
  memcpy(norm_piece.host(), model.final_norm, norm_.bytes());
  stream.copy_in(norm_.as(), norm_piece.host(), norm_.bytes());
  stream.sync();
}

void HeadWeights::upload_tiles(const Model &model, Stream &stream) {
  const int chunks = round_up(hidden, kCoarseCols) / kCoarseCols, row_blocks = tile_count / 2;
  const size_t block_bytes = (size_t)chunks * kCoarseChunk;
  const int at_once = std::max(1, std::min(row_blocks, (int)(kPiece / block_bytes)));
  SharedBytes piece(at_once * block_bytes);
  for (int first = 0; first < row_blocks; first += at_once) {
    const int count = std::min(at_once, row_blocks - first);
    memcpy(piece.host(), model.coarse.tiles + first * block_bytes, count * block_bytes);
    uint4 *to = (uint4 *)(tiles_.as() + (size_t)2 * first * steps * kHeadStepWords * 16);
    launch_head_repack({piece.device(), chunks, steps, 2 * count, to}, stream);
    stream.sync();  // before the piece is filled again
  }
}

void HeadWeights::upload_facts(const Coarse &coarse, Stream &stream) {
  SharedBytes piece(facts_.bytes());
  float *to = piece.host<float>();
  for (int row = 0; row < vocab; ++row, to += 4)
    to[0] = coarse.scale[row], to[1] = coarse.error[row], to[2] = coarse.norm[row];
  stream.copy_in(facts_.as(), piece.host(), facts_.bytes());
  stream.sync();
}

GpuHead::GpuHead(const HeadWeights &weights, int most, uint32_t *status)
    : weights_(weights),
      most_(most),
      row_(round_up(weights.hidden, 16)),
      rows_(weights.tile_count * 8),
      coarse_blocks_(blocks_for(rows_, 128, kCoarseBlocks)),
      exact_blocks_(blocks_for(rows_, 128, kExactBlocks)),
      pass_(largest_pass({16, 8}, head_coarse_shared, weights.hidden)),
      logits_pass_(largest_pass({8, 4}, head_logits_shared, weights.hidden)),
      status_(status) {
  auto cut = [&](uint8_t *from) {
    Cut cut(from);
    kept_ = cut.take<float>((size_t)most_ * row_);
    upper_ = cut.take<float>((size_t)kHeadAtOnce * rows_);
    parts_ = cut.take<int8_t>((size_t)kHeadAtOnce * 2 * weights_.steps * kHeadStepCols);
    tokens_ = cut.take<HeadToken>(kHeadAtOnce);
    best_ = cut.take<HeadBest>((size_t)kHeadAtOnce * coarse_blocks_);
    search_ = cut.take<HeadSearch>(kHeadAtOnce);
    counts_ = cut.take<int32_t>((size_t)kHeadAtOnce * exact_blocks_);
    some_ids_ = cut.take<int32_t>((size_t)kHeadAtOnce * weights_.vocab);
    some_logits_ = cut.take<float>((size_t)kHeadAtOnce * weights_.vocab);
    return cut.bytes();
  };
  memory_ = DeviceBytes(cut(nullptr), "the output head's working memory");
  cut(memory_.as());
}

// Of several tokens there are blocks enough: each then looks at more rows, since what it does before costs as much.
int GpuHead::exact_blocks(int tokens) const {
  const int turns = (rows_ + 2 * kHeadRowsInTurn - 1) / (2 * kHeadRowsInTurn);
  return std::min(exact_blocks_, std::max(exact_blocks_ / tokens, turns));
}

void GpuHead::check(int count, int most) const {
  if (count < 1 || count > most)
    throw Failure(HALO_INTERNAL, "the output head is asked for %d of %d rows", count, most);
}

HeadNormArgs GpuHead::norm_args(const Wanted &wanted, int first) const {
  HeadNormArgs args = {};
  args.x = wanted.rows ? wanted.x : wanted.x + (size_t)first * wanted.stride;
  args.stride = wanted.stride;
  args.wanted = wanted.rows ? wanted.rows + first : nullptr;
  args.norm = weights_.norm();
  args.n = weights_.hidden;
  args.eps = weights_.eps;
  args.steps = weights_.steps;
  args.kept = kept_ + (size_t)first * row_;
  args.kept_stride = row_;
  args.parts = parts_;
  args.tokens = tokens_;
  args.status = status_;
  return args;
}

// The bounds of `count` tokens from `first` on, at most kHeadAtOnce: in passes of as many as a block can hold.
void GpuHead::put_coarse(const Wanted &wanted, int first, int count, const float *noise, Stream &stream) {
  HeadCoarseArgs args = {};
  args.tiles = weights_.tiles();
  args.facts = weights_.facts();
  args.vocab = weights_.vocab;
  args.tile_count = weights_.tile_count;
  if (count > 1 && pass_ > 1) launch_head_norm(norm_args(wanted, first), count, stream);
  for (int t = 0; t < count; t += args.count) {
    args.count = std::min(count - t, pass_);
    args.own = norm_args(wanted, first + t);
    args.parts = parts_ + (size_t)t * 2 * weights_.steps * kHeadStepCols;
    args.tokens = tokens_ + t;
    args.noise = noise ? noise + (size_t)t * weights_.vocab : nullptr;
    args.upper = upper_ + (size_t)t * rows_;
    args.best = best_ + (size_t)t * coarse_blocks_;
    launch_head_coarse(args, coarse_blocks_, stream);
  }
}

HeadExactArgs GpuHead::exact_args(int first, const float *noise, int32_t *ids, int32_t *found) const {
  return {weights_.rows, kept_ + (size_t)first * row_, row_, weights_.hidden, weights_.vocab, rows_, upper_, best_,
          coarse_blocks_, noise, search_, ids, found, status_};
}

void GpuHead::put_argmax(const float *x, int stride, const int32_t *wanted, int count, int32_t *ids, Stream &stream) {
  check(count, most_);
  for (int first = 0; first < count; first += kHeadAtOnce) {
    const int some = std::min(kHeadAtOnce, count - first);
    put_coarse({x, stride, wanted, count}, first, some, nullptr, stream);
    launch_head_exact(exact_args(first, nullptr, ids + first, nullptr), some, exact_blocks(some), stream);
  }
}

void GpuHead::put_draw(const float *x, int stride, const int32_t *wanted, int count, const GpuDraw &draw,
                       Stream &stream) {
  check(count, most_);
  if (draw.room < 0) throw Failure(HALO_INTERNAL, "the output head has room for %d", draw.room);
  const int room = std::min(draw.room, weights_.vocab);  // more can never be found
  for (int first = 0; first < count; first += kHeadAtOnce) {
    const int some = std::min(kHeadAtOnce, count - first);
    const float *noise = draw.noise + (size_t)first * weights_.vocab;
    put_coarse({x, stride, wanted, count}, first, some, noise, stream);
    const HeadExactArgs exact = exact_args(first, noise, draw.winners + first, draw.found + first);
    launch_head_exact(exact, some, exact_blocks(some), stream);
    if (!draw.room) continue;
    HeadNearArgs near = {exact, draw.depth, room, counts_, some_ids_, some_logits_, draw.found + first,
                         draw.ids + (size_t)first * draw.room, draw.logits + (size_t)first * draw.room, draw.room};
    launch_head_near(near, some, exact_blocks(some), stream);
  }
}

void GpuHead::put_logits(const float *x, int stride, const int32_t *wanted, int count, float *logits, Stream &stream) {
  check(count, most_);
  HeadNormArgs norm = norm_args({x, stride, wanted, count}, 0);
  norm.parts = nullptr;
  launch_head_norm(norm, count, stream);
  put_some_logits(0, count, logits, stream);
}

void GpuHead::put_logits_again(int k, float *logits, Stream &stream) {
  check(k + 1, most_);
  put_some_logits(k, 1, logits, stream);
}

void GpuHead::put_some_logits(int first, int count, float *logits, Stream &stream) {
  HeadLogitsArgs args = {weights_.rows, nullptr, row_, weights_.hidden, weights_.vocab, 0, nullptr, status_};
  for (int t = 0; t < count; t += args.count) {
    args.count = std::min(count - t, logits_pass_);
    args.kept = kept_ + (size_t)(first + t) * row_;
    args.logits = logits + (size_t)t * weights_.vocab;
    launch_head_logits(args, blocks_for(rows_, 128, kLogitsBlocks), stream);
  }
}

}  // namespace halo
