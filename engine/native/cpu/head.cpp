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
const int kAtOnce = 4 * kCoarseTokens;  // tokens that share one pass over the head

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
      packed_(kAtOnce, 2 * (size_t)groups_),
      upper_(kAtOnce, (size_t)rows_),
      tokens_(kAtOnce),
      seen_((size_t)kAtOnce * items_),
      threshold_(kAtOnce),
      best_((size_t)items_, std::max(kItemRows, kAtOnce)),
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

// x as step * (256 high + low), in 16 bits, packed beside those of the other tokens; and what the bounds need of it.
CoarseToken Head::coarse_token(const float *x, int32_t *packed, int count) {
  float most = 0.0f;
  for (int i = 0; i < hidden_; ++i) most = std::max(most, fabsf(x[i]));
  float step = most > 1e-30f ? most / 32000.0f : 0.0f;  // without a step, the bounds say that nothing is known
  CoarseToken token = {step / 2, 0, 0, 0, 0};
  double length = 0, taken = 0, missed = 0;
  for (int i = 0; i < 4 * groups_; ++i) {
    int value = i < hidden_ && step > 0 ? (int)lrintf(x[i] / step) : 0;
    value = std::max(-32500, std::min(32500, value));
    int high = (value + 128) >> 8, low = value - 256 * high;
    double own = i < hidden_ ? x[i] : 0.0, miss = own - (double)step * value;
    length += own * own;
    taken += (double)step * value * ((double)step * value);
    missed += miss * miss;
    token.high_sum += high;
    token.low_sum += low;
    int8_t *group = (int8_t *)&packed[(size_t)(2 * (i / 4)) * count];
    group[i % 4] = (int8_t)high;
    ((int8_t *)((int32_t *)group + count))[i % 4] = (int8_t)low;
  }
  length = sqrt(length), taken = sqrt(taken), missed = sqrt(missed);
  double chain = (round_up(hidden_, 16) / 16 + 8) * ldexp(1.0, -24);  // of the exact logit's own rounding
  double floats = ldexp(1.0, -19) * (taken + 128.0 * step * sqrt((double)hidden_));  // of coarse_bounds'
  token.by_error = (float)((taken + floats) * 1.001);
  token.by_norm = (float)((missed + chain * length + floats) * 1.001);
  return token;
}

// The bounds of every logit, and for each token a logit that is certain to be reached.
void Head::look(const float *x, int stride, int count) {
  auto packed = [&](int first) { return &packed_[(size_t)first * 2 * groups_]; };
  pool_.each(count, [&](int t, int) {
    int first = t / kCoarseTokens * kCoarseTokens;
    tokens_[t] = coarse_token(x + (size_t)t * stride, packed(first) + (t - first), std::min(kCoarseTokens, count - first));
  });
  const Coarse &coarse = model_.coarse;
  int chunks = 4 * groups_ / kCoarseCols;
  pool_.each(items_, [&](int item, int) {
    int first = item * kItemRows, rows = std::min(kItemRows, vocab_ - first);
    const float low = -std::numeric_limits<float>::infinity();
    for (int t = 0; t < count; ++t) seen_[(size_t)t * items_ + item] = {low, low, first};
    int32_t sums[kCoarseTokens * 32];
    for (int row = first; row < first + rows; row += kRows) {
      const uint8_t *tiles = coarse.tiles + (size_t)(row / kRows) * chunks * kCoarseChunk;
      for (int t = 0; t < count; ++t) {
        if (t % kCoarseTokens == 0)
          kernels_.coarse(tiles, chunks, packed(t), std::min(kCoarseTokens, count - t), sums);
        kernels_.coarse_bounds(sums + 32 * (t % kCoarseTokens), std::min(kRows, vocab_ - row), row, coarse.scale + row,
                               coarse.error + row, coarse.norm + row, tokens_[t], &upper(t, row),
                               &seen_[(size_t)t * items_ + item]);
      }
    }
  });
  for (int t = 0; t < count; ++t) raise(x + (size_t)t * stride, t);
}

void Head::raise(const float *x, int t) {
  const CoarseBest *seen = &seen_[(size_t)t * items_], *top = seen;
  float certain = seen->certain;
  for (int item = 1; item < items_; ++item) {
    certain = std::max(certain, seen[item].certain);
    if (seen[item].seen > top->seen) top = &seen[item];
  }
  threshold_[t] = std::max(certain, exact(x, top->row));
}

// The largest exact logit of an item's rows; a logit of minus infinity if none can reach the threshold.
Head::Best Head::best_of(const float *x, int t, int item) const {
  Best best = {-std::numeric_limits<float>::infinity(), -1};
  int first = item * kItemRows, end = std::min(first + kItemRows, vocab_);
  for (int id = first; id < end; ++id) {
    if (upper(t, id) < threshold_[t]) continue;  // an upper bound that is no number excludes nothing
    float logit = exact(x, id);
    if (best.id < 0 || logit > best.logit || !finite_bits(logit)) best = {logit, id};
    if (!finite_bits(logit)) break;
  }
  return best;
}

bool Head::largest(const float *x, int stride, int count, int32_t *ids) {
  for (int start = 0; start < count; start += kAtOnce) {
    int some = std::min(kAtOnce, count - start);
    const float *rows = x + (size_t)start * stride;
    look(rows, stride, some);
    pool_.each(items_ * some, [&](int i, int) {
      int t = i / items_;
      best_[i] = best_of(rows + (size_t)t * stride, t, i % items_);
    });
    for (int t = 0; t < some; ++t) {
      Best best = {0, -1};
      for (int item = 0; item < items_; ++item) {
        const Best &own = best_[(size_t)t * items_ + item];
        if (own.id < 0) continue;
        if (!finite_bits(own.logit)) return false;
        if (best.id < 0 || own.logit > best.logit) best = own;
      }
      if (best.id < 0) return false;
      ids[start + t] = best.id;
    }
  }
  return true;
}

bool Head::near(const float *x, int stride, int count, const float *margin, size_t room, int32_t *ids, float *logits,
                int32_t *found) {
  for (int t = 0; t < count; ++t) {
    const float *row = x + (size_t)t * stride;
    int32_t top;
    if (!largest(row, stride, 1, &top)) return false;
    float least = exact(row, top) - margin[t];
    std::atomic<size_t> total{0};
    std::atomic<bool> finite{true};
    pool_.each(items_, [&](int item, int) {
      int first = item * kItemRows, end = std::min(first + kItemRows, vocab_), count = 0;
      for (int id = first; id < end && total <= room; ++id) {
        if (upper(0, id) < least) continue;
        float logit = exact(row, id);
        if (!finite_bits(logit)) finite = false;
        if (logit < least) continue;
        best_[(size_t)item * kItemRows + count++] = {logit, id};
        ++total;
      }
      kept_[item] = count;
    });
    if (!finite) return false;
    found[t] = total > room ? -1 : (int32_t)total;
    if (total > room) continue;
    size_t at = (size_t)t * room;
    for (int item = 0; item < items_; ++item)
      for (int i = 0; i < kept_[item]; ++i, ++at) {
        const Best &own = best_[(size_t)item * kItemRows + i];
        ids[at] = own.id, logits[at] = own.logit;
      }
  }
  return true;
}

}  // namespace halo
