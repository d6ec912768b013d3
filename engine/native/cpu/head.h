// The output head: exact logits of every token, or of the few that matter. docs/exact-head.md has the proof.
#pragma once
#include <atomic>
#include <vector>

#include "batch.h"
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

  // ids[t]: the arg max of logit + noise[t * vocab + id], of the logit alone without noise; the lowest id on a tie.
  bool largest(const float *x, int stride, int count, const float *noise, int32_t *ids);

  // The same with noise, and what is near: see halo_session_draw.
  bool draw(const float *x, int stride, int count, const Draw &draw);

 private:
  struct Best {
    float value;  // logit + noise
    int32_t id;
  };

  struct Grain {
    float step;
    bool even;  // low is nothing
  };

  void look(const float *x, int stride, int count);
  Grain grain(const float *x, int count) const;
  CoarseToken coarse_token(const float *x, Grain grain, int first_vector);
  int8_t *packed(int vector, int i);
  float exact(const float *x, int id) const;
  const CoarseBest &top(int t) const;
  float certain(const float *x, int t, const float *noise);
  Best best_of(const float *x, int t, int item, const float *noise) const;
  int32_t winner(const float *x, int t, const float *noise);
  bool near(const float *x, int t, float least, size_t room, int32_t *ids, float *logits, int32_t *found);
  float &upper(int t, int id) { return upper_[(size_t)t * rows_ + id]; }
  float upper(int t, int id) const { return const_cast<Buffer<float> &>(upper_)[(size_t)t * rows_ + id]; }

  const Model &model_;
  const Kernels &kernels_;
  Pool &pool_;
  const int vocab_, hidden_, rows_, groups_, items_;
  int vectors_ = 0;  // one or two for each token that is looked at
  Buffer<int32_t> packed_;
  Buffer<float> upper_;  // [token][row]: what no logit can exceed
  std::vector<CoarseToken> tokens_;
  std::vector<CoarseBest> seen_;  // [token][item]
  float threshold_ = 0;
  Buffer<Best> best_;             // [item], or [item][row of it]
  std::vector<int> kept_;         // of an item's rows
};

}  // namespace halo
