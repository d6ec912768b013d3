// The attention kernels, written once on 16 virtual lanes (lanes.inc.h, which must be included before) and included
// by each path. Like lanes.inc.h it has internal linkage.
#include "attention_kernels.h"

namespace {

float softmax_weights(float *scores, int positions) {
  float most = scores[0];
  for (int j = 1; j < positions; ++j) most = scores[j] > most ? scores[j] : most;
  V top = vset1(most), sum = vzero();
  for (int j = positions; j % 16; ++j) scores[j] = most;
  for (int j = 0; j < positions; j += 16) {
    vstore(scores + j, vexp(vsub(vload(scores + j), top)));
    for (int k = positions; k < j + 16; ++k) scores[k] = 0.0f;
    sum = vadd(sum, vload(scores + j));
  }
  return vsum(sum);
}

template <int kChunks>
inline void weigh_values(const float *scores, const float *v, int positions, int width, V total, float *out) {
  V sum[kChunks];
  for (int c = 0; c < kChunks; ++c) sum[c] = vzero();
  for (int j = 0; j < positions; ++j) {
    V p = vset1(scores[j]);
    for (int c = 0; c < kChunks; ++c) sum[c] = vfma(p, vload(v + (size_t)j * width + 16 * c), sum[c]);
  }
  for (int c = 0; c < kChunks; ++c) vstore(out + 16 * c, vdiv(sum[c], total));
}

void attend(const float *q, const float *k, const float *v, int positions, int width, float scale, float *scores,
            float *out) {
  dot_rows_of<false>((const uint8_t *)k, (size_t)width * 4, positions, q, width, scores);
  for (int j = 0; j < positions; ++j) scores[j] *= scale;
  V total = vset1(softmax_weights(scores, positions));
  int d = 0;
  for (; d + 64 <= width; d += 64) weigh_values<4>(scores, v + d, positions, width, total, out + d);
  for (; d < width; d += 16) weigh_values<1>(scores, v + d, positions, width, total, out + d);
}

const halo::AttentionKernels attention_kernels = {attend};

}  // namespace
