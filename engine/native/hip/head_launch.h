// The output head's kernels as the host sees them: where things lie, arguments, launches. No device code: that is
// head_kernels.h. docs/exact-head.md tells what they compute.
//
// Coarse head on the device: tiles of 8 rows, filled up to an even number of them; a tile holds `steps` steps of 256
// columns, a step 1,536 bytes: three pieces of 512, of which lane l has 16 bytes each. Lane l has row l % 8 and, of the
// step's columns, 64 from 64 (l / 8). Its 12 words hold 64 levels of six bits: byte b of word i has the level of column
// 4 i + b in bits 0 to 5; the last 16 columns lie in bits 6 and 7: byte b of words 3 j, 3 j + 1, 3 j + 2 has bits 0-1,
// 2-3, 4-5 of the level of column 48 + 4 j + b.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "gpu_types.h"
#include "runtime.h"

namespace halo {

const int kHeadAtOnce = 16;    // tokens whose bounds stand at once
const int kHeadStepCols = 256;
const int kHeadStepWords = 96;  // of 16 bytes
const int kHeadRowsInTurn = 2048;  // rows that a block of the exact pass looks at in one turn

// Rows of full precision on the device: the embedding, or a head of its own.
struct HeadRows {
  const uint8_t *data;
  size_t row_bytes;
  int bf16;
};

// A token as the coarse pass sees it: CoarseToken of the CPU (cpu/kernels.h).
struct HeadToken {
  float half_step, by_error, by_norm;
  int32_t high_sum, low_sum, unused[3];
};

// What a block of the coarse pass found in its rows: the largest certain logit, the row that looks best, and the one
// that looks best with noise.
struct HeadBest {
  float certain, seen, drawn;
  int32_t seen_row, drawn_row;
};

// The search for the arg max of one token. All zero between steps, but for the winner.
struct HeadSearch {
  uint64_t largest;  // value and id as one number: the larger value, then the lower id, is the larger number
  int32_t done;      // blocks
  int32_t near_done;
  int32_t winner;
  int32_t unused;
};

struct HeadRepackArgs {
  const uint8_t *source;  // whole row blocks of engine/formats/tiles.py
  int chunks;             // of 16 columns, a row block has
  int steps, tile_count;
  uint4 *tiles;
};

// Final norm of the wanted rows, one block each; what the coarse pass needs of them.
struct HeadNormArgs {
  const float *x;
  int stride;
  const int32_t *wanted;  // rows of x; null: 0, 1, 2, ...
  const float *norm;
  int n;
  float eps;
  int steps;
  float *kept;  // [token][kept_stride], the normed row filled up with zeros
  int kept_stride;
  int8_t *parts;      // [token][high, low][256 steps]; null: not wanted
  HeadToken *tokens;
  uint32_t *status;
};

struct HeadCoarseArgs {
  HeadNormArgs own;  // of one token: the norm is the coarse pass's own
  const uint4 *tiles, *facts;  // facts: [row] scale, error, norm, 0 as floats
  int vocab, tile_count, count;
  const int8_t *parts;
  const HeadToken *tokens;
  const float *noise;  // [token][vocab]; null: none
  float *upper;        // [token][8 tile_count]
  HeadBest *best;      // [token][blocks]
};

struct HeadExactArgs {
  HeadRows rows;
  const float *kept;
  int kept_stride, n, vocab, upper_stride;
  const float *upper;
  const HeadBest *best;
  int best_count;  // blocks of the coarse pass
  const float *noise;
  HeadSearch *search;  // [token]
  int32_t *ids;        // [token]
  int32_t *none_found;  // [token]: -1 is written there; null: nowhere
  uint32_t *status;
};

// What lies near the winner: halo_session_draw in halo.h.
struct HeadNearArgs {
  HeadExactArgs exact;
  const float *depth;
  int room;
  int32_t *counts;  // [token][blocks]
  int32_t *some_ids;  // [token][vocab]
  float *some_logits;
  int32_t *found, *ids;  // [token], [token][stride]
  float *logits;
  int stride;
};

struct HeadLogitsArgs {
  HeadRows rows;
  const float *kept;
  int kept_stride, n, vocab, count;
  float *logits;  // [token][vocab]
  uint32_t *status;
};

// Of a block's dynamic shared memory, so that a model that is too wide is refused when it is loaded.
size_t head_norm_shared(int n);
size_t head_coarse_shared(int n, int tokens);
size_t head_exact_shared(int n);
size_t head_logits_shared(int n, int tokens);

// The tokens that the kernel of a pass takes, for `count` of them.
inline int head_coarse_tokens(int count) { return count > 8 ? 16 : count > 1 ? 8 : 1; }
inline int head_logits_tokens(int count) { return count > 4 ? 8 : count > 1 ? 4 : 1; }

void launch_head_repack(const HeadRepackArgs &args, Stream &stream);
void launch_head_norm(const HeadNormArgs &args, int tokens, Stream &stream);
void launch_head_coarse(const HeadCoarseArgs &args, int blocks, Stream &stream);  // args.count: 1 to 16
void launch_head_exact(const HeadExactArgs &args, int tokens, int blocks, Stream &stream);
void launch_head_near(const HeadNearArgs &args, int tokens, int blocks, Stream &stream);
void launch_head_logits(const HeadLogitsArgs &args, int blocks, Stream &stream);  // args.count: 1 to 8

}  // namespace halo
