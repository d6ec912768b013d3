// The output head on the device, as a session uses it: HeadWeights is of the model, GpuHead of the session. Its calls
// only put work on the stream. docs/exact-head.md has the proof, cpu/head.cpp the same on the CPU.
#pragma once
#include <vector>

#include "../cpu/model.h"
#include "head_launch.h"
#include "runtime.h"

namespace halo {

// The coarse head and the final norm in the device's memory.
class HeadWeights {
 public:
  // Reads them from the file and repacks them; `rows` are the rows of full precision, which stay the caller's. Throws
  // Failure(HALO_UNSUPPORTED) for a hidden size whose rows a block of threads cannot hold.
  HeadWeights(const Model &model, const HeadRows &rows, Stream &stream);

  size_t bytes() const { return tiles_.bytes() + facts_.bytes() + norm_.bytes(); }
  const HeadRows rows;
  const int vocab, hidden, steps, tile_count;
  const float eps;
  const uint4 *tiles() const { return tiles_.as<uint4>(); }
  const uint4 *facts() const { return facts_.as<uint4>(); }
  const float *norm() const { return norm_.as<float>(); }

 private:
  void upload_tiles(const Model &model, Stream &stream);
  void upload_facts(const Coarse &coarse, Stream &stream);

  DeviceBytes tiles_, facts_, norm_;
};

// Where the results of draws go: memory that the device can write, the host's (SharedBytes) or its own.
struct GpuDraw {
  const float *noise;  // [count][vocab]
  const float *depth;  // one number
  int room;
  int32_t *winners, *found;  // [count]; found[t] is -1 where they are more than room, and where room is 0
  int32_t *ids;              // [count][room]
  float *logits;
};

class GpuHead {
 public:
  // At most `most` rows are wanted at once. `status` gets kNotFinite where a logit, or a hidden state, is not finite.
  GpuHead(const HeadWeights &weights, int most, uint32_t *status);

  size_t bytes() const { return memory_.bytes(); }

  // Of rows of x, `stride` floats apart, before the final norm, zeros from the hidden size to a multiple of 16: row
  // wanted[t] for t = 0 to count - 1 (null: row t). All of these may be captured in a graph, which holds for the count.

  // ids[t]: the arg max, the lowest id on a tie; -1 where a logit is not finite.
  void put_argmax(const float *x, int stride, const int32_t *wanted, int count, int32_t *ids, Stream &stream);

  // halo_session_draw of halo.h.
  void put_draw(const float *x, int stride, const int32_t *wanted, int count, const GpuDraw &draw, Stream &stream);

  // logits[t * vocab + id]
  void put_logits(const float *x, int stride, const int32_t *wanted, int count, float *logits, Stream &stream);

  // All logits of row k of the last of these calls, whose normed rows are kept.
  void put_logits_again(int k, float *logits, Stream &stream);

 private:
  struct Wanted {
    const float *x;
    int stride;
    const int32_t *rows;
    int count;
  };

  HeadNormArgs norm_args(const Wanted &wanted, int first) const;
  void put_coarse(const Wanted &wanted, int first, int count, const float *noise, Stream &stream);
  HeadExactArgs exact_args(int first, const float *noise, int32_t *ids, int32_t *found) const;
  void put_some_logits(int first, int count, float *logits, Stream &stream);
  int exact_blocks(int tokens) const;
  void check(int count, int most) const;

  const HeadWeights &weights_;
  const int most_, row_, rows_, coarse_blocks_, exact_blocks_;
  int pass_, logits_pass_;  // tokens that a pass may take: what fits into a block's shared memory
  uint32_t *status_;
  DeviceBytes memory_;
  float *kept_, *upper_;
  int8_t *parts_;
  HeadToken *tokens_;
  HeadBest *best_;
  HeadSearch *search_;
  int32_t *counts_, *some_ids_;
  float *some_logits_;
};

}  // namespace halo
