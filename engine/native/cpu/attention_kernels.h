// The table of attention kernels that each CPU path fills in. kernels.h states the rules; they hold here too.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace halo {

struct AttentionKernels {
  // One head of one token: out = softmax(scale * q k^T) v over `positions` rows of k and v, `width` floats each
  // (a multiple of 16). scores has room for `positions` filled up to 16.
  void (*attend)(const float *q, const float *k, const float *v, int positions, int width, float scale, float *scores,
                 float *out);
};

}  // namespace halo
