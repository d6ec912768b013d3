// The output head: exact logits of every token, or of the few that matter. docs/exact-head.md has the proof.
#pragma once
#include <atomic>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "model.h"
#include "pool.h"

namespace halo {

class Head {
 public:
  Head(const Model &model, const Kernels &kernels, Pool &pool);

  // Rows of hidden states (after the final norm), `stride` floats apart. All return false if a logit is not finite.

  // logits[t * vocab + id]
  bool all(const float *x, int stride, int count, float *logits);

  // ids[t]: the arg max, the lowest id on a tie.
  bool largest(const float *x, int stride, int count, int32_t *ids);

  // Every token whose logit is at least the largest less margin[t], by rising id: ids and logits at t * room, their
  // number in found[t]; where they are more than `room`, found[t] is -1.
  bool near(const float *x, int stride, int count, const float *margin, size_t room, int32_t *ids, float *logits,
            int32_t *found);

 private:
  struct Best {
    float logit;
    int32_t id;
  };

  void look(const float *x, int stride, int count);
  CoarseToken coarse_token(const float *x, int32_t *packed, int count);
  float exact(const float *x, int id) const;
  Best best_of(const float *x, int t, int item) const;
  void raise(const float *x, int t);
  float &upper(int t, int id) { return upper_[(size_t)t * rows_ + id]; }
  float upper(int t, int id) const { return const_cast<Buffer<float> &>(upper_)[(size_t)t * rows_ + id]; }

  const Model &model_;
  const Kernels &kernels_;
  Pool &pool_;
  const int vocab_, hidden_, rows_, groups_, items_;
  Buffer<int32_t> packed_;
  Buffer<float> upper_;  // [token][row]: what no logit can exceed
  std::vector<CoarseToken> tokens_;
  std::vector<CoarseBest> seen_;  // [token][item]
  std::vector<float> threshold_;  // a logit that is certain to be reached
  Buffer<Best> best_;             // [token][item], or [item][row of it]
  std::vector<int> kept_;         // of an item's rows
};

}  // namespace halo
