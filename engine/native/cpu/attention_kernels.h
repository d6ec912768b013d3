// The table of attention kernels that each CPU path fills in, and the order of the arithmetic that all of them keep.
//
// The cache is walked in blocks of 256 positions. A block gives, for each query, the largest score, the sum of the
// weights exp(score - largest) (16 lanes, a tree: kernels.h) and the sum of weight times value; blocks are put together
// in rising order by `merge`. So a block can be anyone's work, and the result is the same.
//
// Forms of floats: a score adds over the elements in rising order, and a value sum over the positions in rising order,
// both by fused multiply-add. Integer forms: queries and keys are int8, weights 15 bits of the block's largest, values
// int8; the sums are exact. engine/kv_forms.py says the same in NumPy.
//
// Where a head's vector of `width` elements (head_dim filled up to 16 with zeros) lies, for position p, element d:
//   float keys    [p / 16][d][p % 16]            values [p][d]
//   int8 keys     [p / 16][d / 4][p % 16][d % 4]  with 128 added
//   int8 values   [p / 2][d][p % 2]
//   rotor3        the int8 order; each 512 of these codes packed into 192 bytes: code c = 64 * k + i has its lower two
//                 bits at 2 * (k % 4) of byte 64 * (k / 4) + i, and its third at k of byte 128 + i
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace halo {

const int kBlockPositions = 256;
const int kRowTile = 4;

// Up to kRowTile queries that share a KV head, and one block of its cache.
struct BlockRows {
  int rows, head_dim, width;
  // What to fetch into the cache meanwhile: as many bytes as this block's keys, and as its values; NULL: nothing.
  const void *fetch_with_keys, *fetch_with_values;
  const int *limits;        // positions of the block that each row sees, 1 to 256
  const float *q;           // float forms: [rows][width], scaled
  const int8_t *q8;         // integer forms: [rows][width]
  const float *q_scales;    // [rows], with the attention's scale in them
  const void *keys, *values;
  const float *key_scales, *value_scales;  // integer forms: one a position
  float *tops, *totals, *sums;             // results: [rows], [rows], [rows][width]
};

// A query's sums so far.
struct Partial {
  float *top, *total, *sums;
};

struct AttentionKernels {
  void (*f32)(const BlockRows &rows);
  void (*f16)(const BlockRows &rows);
  void (*int8)(const BlockRows &rows);
  void (*merge)(Partial all, Partial block, int width);
  void (*finish)(const float *sums, float total, int width, float *out);  // out = sums / total

  // Rotate-half RoPE: element i turns with element i + half.
  void (*rope)(const float *in, const float *cosine, const float *sine, int half, float *out);
  // True if |x| < 2^40 for all of n elements (a multiple of 16): what no sum of the attention can overflow with.
  bool (*in_range)(const float *x, int n);
  // Round to float16, nearest even; what is beyond its range becomes its largest.
  void (*to_half)(const float *x, int n, uint16_t *y);
  // y = round_half_even(x * 127 / m), m = max(max|x|, 1e-30); the scale m / 127 is returned.
  float (*to_int8)(const float *x, int n, int8_t *y);
  // x = H x: the Walsh-Hadamard transform of n elements (a power of two), not normalised.
  void (*hadamard)(float *x, int n);
  // Codes of the Lloyd-Max levels of x / rms(x): 0 to 3 by magnitude, 4 added if negative. The scale is returned.
  float (*to_rotor3)(const float *x, int n, uint8_t *codes);
  // `groups` times 192 bytes to 512 levels each; levels[code].
  void (*unpack_rotor3)(const uint8_t *packed, int groups, const uint8_t levels[8], uint8_t *out);
};

// Levels of a Gaussian for eight codes (Max, 1960: 0.2451, 0.7560, 1.3439, 2.1520), in integers that keep their ratios.
const int kRotorLevels[4] = {13, 40, 71, 114};

}  // namespace halo
