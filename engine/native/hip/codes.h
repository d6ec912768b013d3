// The two packings of ternary weights as a wave meets them: 16 bytes of codes times the activations that they belong to,
// summed exactly. layout.h has the order. Not the products around it: product.h. Device code.
#pragma once
#include "gpu.h"

namespace halo {

GPU_DEVICE uint32_t word_of(const uint4 &w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

// Sums of one token: 16 bytes of codes times the activations that they meet. The codes stay where they are in their
// bytes, times 4^s; the four sums are shifted back once, when all is added.
struct TwoBits {
  static const int kCols = 256, kPart = 64;
  struct Sums {
    int of[4] = {0, 0, 0, 0};
  };
  GPU_DEVICE void add(Sums &sums, const uint4 &w, const int8_t *x) {
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint4 four = ((const uint4 *)x)[i];
      uint32_t word = word_of(w, i);
      sums.of[0] = dot4_us(word & 0x03030303u, four.x, sums.of[0]);
      sums.of[1] = dot4_us(word & 0x0c0c0c0cu, four.y, sums.of[1]);
      sums.of[2] = dot4_us(word & 0x30303030u, four.z, sums.of[2]);
      sums.of[3] = dot4_us(word & 0xc0c0c0c0u, four.w, sums.of[3]);
    }
  }
  GPU_DEVICE int total(const Sums &s) { return s.of[0] + (s.of[1] >> 2) + (s.of[2] >> 4) + (s.of[3] >> 6); }
  // Of several tokens, `stride` bytes apart.
  template <int kTokens>
  GPU_DEVICE void add_many(int *sums, const uint4 &w, const int8_t *x, int stride) {
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t word = word_of(w, i), codes[4];
      GPU_UNROLL
      for (int s = 0; s < 4; ++s) codes[s] = word >> 2 * s & 0x03030303u;
      GPU_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        uint4 four = ((const uint4 *)(x + t * stride))[i];
        sums[t] = dot4_us(codes[0], four.x, sums[t]);
        sums[t] = dot4_us(codes[1], four.y, sums[t]);
        sums[t] = dot4_us(codes[2], four.z, sums[t]);
        sums[t] = dot4_us(codes[3], four.w, sums[t]);
      }
    }
  }
};

struct BaseThree {
  static const int kCols = 320, kPart = 80;
  struct Sums {
    int of[2] = {0, 0};
  };
  // Five times four codes of one word, by multiplying with 3 and taking what goes beyond the byte.
  GPU_DEVICE void unpack(uint32_t word, uint32_t (&codes)[5]) {
    uint32_t even = word & 0x00ff00ffu, odd = word >> 8 & 0x00ff00ffu;
    GPU_UNROLL
    for (int d = 0; d < 5; ++d) {
      even = even + (even << 1);
      odd = odd + (odd << 1);
      codes[d] = (even >> 8 & 0x00030003u) | (odd & 0x03000300u);
      even &= 0x00ff00ffu;
      odd &= 0x00ff00ffu;
    }
  }
  template <int kTokens>
  GPU_DEVICE void add_many(int *sums, const uint4 &w, const int8_t *x, int stride) {
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t codes[5];
      unpack(word_of(w, i), codes);
      GPU_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const uint32_t *own = (const uint32_t *)(x + t * stride) + 5 * i;
        GPU_UNROLL
        for (int d = 0; d < 5; ++d) sums[t] = dot4_us(codes[d], own[d], sums[t]);
      }
    }
  }
  GPU_DEVICE void add(Sums &sums, const uint4 &w, const int8_t *x) {
    uint32_t four[20];
    GPU_UNROLL
    for (int i = 0; i < 5; ++i) {
      uint4 v = ((const uint4 *)x)[i];
      four[4 * i] = v.x, four[4 * i + 1] = v.y, four[4 * i + 2] = v.z, four[4 * i + 3] = v.w;
    }
    GPU_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t codes[5];
      unpack(word_of(w, i), codes);
      GPU_UNROLL
      for (int d = 0; d < 5; ++d) sums.of[d % 2] = dot4_us(codes[d], four[5 * i + d], sums.of[d % 2]);
    }
  }
  GPU_DEVICE int total(const Sums &s) { return s.of[0] + s.of[1]; }
};

}  // namespace halo
