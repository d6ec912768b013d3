// Two stages. A pass over the head at six bits gives each logit an interval that holds the exact one; what cannot be the
// largest, or near it, is never read at full precision.
#include "head.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <limits>

namespace halo {
namespace {

const int kBlocks = 16;  // blocks of 16 rows in one item of work
const int kItemRows = kBlocks * kRows;
const int kAtOnce = 16;  // tokens that share one pass over the head
// Where so many tokens share a pass that it is arithmetic that takes the time, a hidden state whose largest element is at
// most so many times its rms is taken in 8 bits: half the work, and more rows to compute exactly.
const int kMany = 4;
const float kEven = 6.0f;

bool finite_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bits & 0x7fffffffu) < 0x7f800000u;
}

}  // namespace

Head::Head(const Model &model, const Kernels &kernels, Pool &pool)
    : model_(model),
      kernels_(kernels),
      pool_(pool),
      vocab_(model.config.vocab_size),
      hidden_(model.config.hidden_size),
      rows_(round_up(vocab_, kRows)),
      groups_(round_up(hidden_, kCoarseCols) / 4),
      items_((vocab_ + kItemRows - 1) / kItemRows),
      packed_(2 * kAtOnce, (size_t)groups_),
      upper_(kAtOnce, (size_t)rows_),
      tokens_(kAtOnce),
      seen_((size_t)kAtOnce * items_),
      best_((size_t)items_, kItemRows),
      kept_((size_t)items_) {}

bool Head::all(const float *x, int stride, int count, float *logits) {
  std::atomic<bool> finite{true};
  pool_.each(items_, [&](int item, int) {
    int first = item * kItemRows, rows = std::min(kItemRows, vocab_ - first);
    for (int t = 0; t < count; ++t) {
      float *out = logits + (size_t)t * vocab_ + first;
      kernels_.dot_rows(model_.head.row(first), model_.head.row_bytes, model_.head.bf16, rows, x + (size_t)t * stride,
                        round_up(hidden_, 16), out);
      for (int r = 0; r < rows; ++r)
        if (!finite_bits(out[r])) finite = false;
    }
  });
  return finite;
}

float Head::exact(const float *x, int id) const {
  float logit;
  kernels_.dot_rows(model_.head.row(id), model_.head.row_bytes, model_.head.bf16, 1, x, round_up(hidden_, 16), &logit);
  return logit;
}

// How finely a hidden state, one of `count`, is taken: in 16 bits or 8.
Head::Grain Head::grain(const float *x, int count) const {
  float most = 0.0f;
  double length = 0;
  for (int i = 0; i < hidden_; ++i) {
    most = std::max(most, fabsf(x[i]));
    length += (double)x[i] * x[i];
  }
  bool even = count >= kMany && (double)most * most * hidden_ <= (double)kEven * kEven * length;
  if (!(most > 1e-30f)) return {0.0f, even};  // without a step, the bounds say that nothing is known
  return {even ? most / (127.0f * 256.0f) : most / 32000.0f, even};
}

// x as step * (256 high + low), the bytes packed beside those of `width` - 1 other vectors; and what the bounds need.
CoarseToken Head::coarse_token(const float *x, Grain grain, int first_vector) {
  CoarseToken token = {grain.step / 2, 0, 0, 0, 0};
  double length = 0, taken = 0, missed = 0;
  for (int i = 0; i < 4 * groups_; ++i) {
    int value = i < hidden_ && grain.step > 0 ? (int)lrintf(x[i] / (grain.even ? 256.0f * grain.step : grain.step)) : 0;
    value = grain.even ? 256 * std::max(-127, std::min(127, value)) : std::max(-32500, std::min(32500, value));
    int high = (value + 128) >> 8, low = value - 256 * high;
    double own = i < hidden_ ? x[i] : 0.0, miss = own - (double)grain.step * value;
    length += own * own;
    taken += (double)grain.step * value * ((double)grain.step * value);
    missed += miss * miss;
    token.high_sum += high;
    token.low_sum += low;
    *packed(first_vector, i) = (int8_t)high;
    if (!grain.even) *packed(first_vector + 1, i) = (int8_t)low;
  }
  length = sqrt(length), taken = sqrt(taken), missed = sqrt(missed);
  double chain = (round_up(hidden_, 16) / 16 + 8) * ldexp(1.0, -24);  // of the exact logit's own rounding
  double floats = ldexp(1.0, -19) * (taken + 128.0 * grain.step * sqrt((double)hidden_));  // of coarse_bounds'
  token.by_error = (float)((taken + floats) * 1.001);
  token.by_norm = (float)((missed + chain * length + floats) * 1.001);
  return token;
}

// Number i of a vector: groups of kCoarseVectors vectors stand together.
int8_t *Head::packed(int vector, int i) {
  int first = vector / kCoarseVectors * kCoarseVectors, width = std::min(kCoarseVectors, vectors_ - first);
  return (int8_t *)&packed_[(size_t)first * groups_ + (size_t)(i / 4) * width + (vector - first)] + i % 4;
}

// The bounds of every logit, and what looks best.
void Head::look(const float *x, int stride, int count) {
  Grain grains[kAtOnce];
  int first_vector[kAtOnce];
  vectors_ = 0;
  for (int t = 0; t < count; ++t) {
    grains[t] = grain(x + (size_t)t * stride, count);
    first_vector[t] = vectors_;
    vectors_ += grains[t].even ? 1 : 2;
  }
  pool_.each(count, [&](int t, int) { tokens_[t] = coarse_token(x + (size_t)t * stride, grains[t], first_vector[t]); });
  const Coarse &coarse = model_.coarse;
  int chunks = 4 * groups_ / kCoarseCols;
  pool_.each(items_, [&](int item, int) {
    int first = item * kItemRows, rows = std::min(kItemRows, vocab_ - first);
    const float low = -std::numeric_limits<float>::infinity();
    for (int t = 0; t < count; ++t) seen_[(size_t)t * items_ + item] = {low, low, first};
    static const int32_t nothing[kRows] = {};
    int32_t sums[2 * kAtOnce * kRows];
    for (int row = first; row < first + rows; row += kRows) {
      const uint8_t *tiles = coarse.tiles + (size_t)(row / kRows) * chunks * kCoarseChunk;
      for (int v = 0; v < vectors_; v += kCoarseVectors)
        kernels_.coarse(tiles, chunks, &packed_[(size_t)v * groups_], std::min(kCoarseVectors, vectors_ - v),
                        sums + v * kRows);
      for (int t = 0; t < count; ++t) {
        const int32_t *high = sums + first_vector[t] * kRows;
        kernels_.coarse_bounds(high, grains[t].even ? nothing : high + kRows, std::min(kRows, vocab_ - row), row,
                               coarse.scale + row, coarse.error + row, coarse.norm + row, tokens_[t], &upper(t, row),
                               &seen_[(size_t)t * items_ + item]);
      }
    }
  });
}

// The row that looks best of all.
const CoarseBest &Head::top(int t) const {
  const CoarseBest *seen = &seen_[(size_t)t * items_], *best = seen;
  for (int item = 1; item < items_; ++item)
    if (seen[item].seen > best->seen) best = &seen[item];
  return *best;
}

// A value (logit + noise) that is certain to be reached: the exact one where the bounds leave most room.
float Head::certain(const float *x, int t, const float *noise) {
  if (!noise) {
    float least = exact(x, top(t).row);
    for (int item = 0; item < items_; ++item) least = std::max(least, seen_[(size_t)t * items_ + item].certain);
    return least;
  }
  pool_.each(items_, [&](int item, int) {
    int first = item * kItemRows, end = std::min(first + kItemRows, vocab_);
    Best best = {-std::numeric_limits<float>::infinity(), first};
    for (int id = first; id < end; ++id)
      if (upper(t, id) + noise[id] > best.value) best = {upper(t, id) + noise[id], id};
    best_[item] = best;
  });
  Best best = best_[0];
  for (int item = 1; item < items_; ++item)
    if (best_[item].value > best.value) best = best_[item];
  return exact(x, best.id) + noise[best.id];
}

// The largest value of an item's rows that can reach the threshold; without an id if none can.
Head::Best Head::best_of(const float *x, int t, int item, const float *noise) const {
  Best best = {-std::numeric_limits<float>::infinity(), -1};
  int first = item * kItemRows, end = std::min(first + kItemRows, vocab_);
  for (int id = first; id < end; ++id) {
    float own = noise ? noise[id] : 0.0f;
    if (upper(t, id) + own < threshold_) continue;  // an upper bound that is no number excludes nothing
    float logit = exact(x, id);
    if (!finite_bits(logit)) return {logit, id};
    if (best.id < 0 || logit + own > best.value) best = {logit + own, id};
  }
  return best;
}

// The token of the largest value; -1 if a logit is not finite.
int32_t Head::winner(const float *x, int t, const float *noise) {
  threshold_ = certain(x, t, noise);
  pool_.each(items_, [&](int item, int) { best_[item] = best_of(x, t, item, noise); });
  Best best = {0, -1};
  for (int item = 0; item < items_; ++item) {
    if (best_[item].id < 0) continue;
    if (!finite_bits(best_[item].value)) return -1;
    if (best.id < 0 || best_[item].value > best.value) best = best_[item];
  }
  return best.id;
}

bool Head::largest(const float *x, int stride, int count, const float *noise, int32_t *ids) {
  for (int start = 0; start < count; start += kAtOnce) {
    int some = std::min(kAtOnce, count - start);
    const float *rows = x + (size_t)start * stride;
    look(rows, stride, some);
    for (int t = 0; t < some; ++t) {
      ids[start + t] = winner(rows + (size_t)t * stride, t, noise ? noise + (size_t)(start + t) * vocab_ : nullptr);
      if (ids[start + t] < 0) return false;
    }
  }
  return true;
}

bool Head::draw(const float *x, int stride, int count, const Draw &draw) {
  // What is near is told from the row that looks best, which must not depend on how many share the pass.
  const int at_once = draw.room ? kMany - 1 : kAtOnce;
  for (int start = 0; start < count; start += at_once) {
    int some = std::min(at_once, count - start);
    look(x + (size_t)start * stride, stride, some);
    for (int t = 0; t < some; ++t) {
      const int k = start + t;
      const float *row = x + (size_t)k * stride;
      draw.winners[k] = winner(row, t, draw.noise + (size_t)k * vocab_);
      draw.found[k] = -1;
      if (draw.winners[k] < 0) return false;
      if (!draw.room) continue;
      float least = std::min(exact(row, draw.winners[k]), exact(row, top(t).row) - draw.depth);
      size_t at = (size_t)k * draw.room;
      if (!near(row, t, least, draw.room, draw.ids + at, draw.logits + at, &draw.found[k])) return false;
    }
  }
  return true;
}

// Every token whose logit is at least `least`, rising; -1 in `found` where they are more than `room`.
bool Head::near(const float *x, int t, float least, size_t room, int32_t *ids, float *logits, int32_t *found) {
  std::atomic<size_t> total{0};
  std::atomic<bool> finite{true};
  pool_.each(items_, [&](int item, int) {
    int first = item * kItemRows, end = std::min(first + kItemRows, vocab_), count = 0;
    for (int id = first; id < end && total <= room; ++id) {
      if (upper(t, id) < least) continue;
      float logit = exact(x, id);
      if (!finite_bits(logit)) finite = false;
      if (logit < least) continue;
      best_[(size_t)item * kItemRows + count++] = {logit, id};
      ++total;
    }
    kept_[item] = count;
  });
  if (!finite) return false;
  *found = total > room ? -1 : (int32_t)total;
  if (total > room) return true;
  for (int item = 0; item < items_; ++item)
    for (int i = 0; i < kept_[item]; ++i) {
      const Best &own = best_[(size_t)item * kItemRows + i];
      *ids++ = own.id, *logits++ = own.value;
    }
  return true;
}

}  // namespace halo
