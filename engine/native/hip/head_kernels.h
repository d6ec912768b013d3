// The output head on the device: exact logits of every token, or of the few that matter, to the last bit what
// cpu/head.cpp gives. docs/exact-head.md has the proof, head_launch.h where things lie. Here: its kernels' launches.
//
//   norm     final RMSNorm, and the row in 16 bits: a kernel of its own for several tokens, part of `coarse` for one
//   coarse   all rows at six bits: an upper bound of each logit, and each block's best rows
//   exact    the threshold, the rows that reach it, their logits, the arg max (of logit + noise)
//   near     every row whose logit is near enough to the winner's, in rising order
//   logits   the full head
#pragma once
#include "head_logits.h"
#include "launch.h"

namespace halo {

inline size_t head_row_bytes(int n) { return (size_t)(n + 15) / 16 * 64; }

size_t head_norm_shared(int n) { return kHeadScratch + head_row_bytes(n); }

size_t head_coarse_shared(int n, int tokens) {
  const size_t steps = (size_t)(n + kHeadStepCols - 1) / kHeadStepCols;
  const size_t found = (tokens * kHeadWaves * sizeof(HeadBest) + 15) / 16 * 16;
  const size_t fixed = kHeadScratch + tokens * sizeof(HeadToken) + found;
  const size_t chunk =
      tokens == 1 ? HeadChunk<1>::kBytes : tokens == 8 ? HeadChunk<8>::kBytes : HeadChunk<16>::kBytes;
  return fixed + 4 * steps * chunk + (tokens == 1 ? 2 * 8 * kHeadTiles * sizeof(int) + head_row_bytes(n) : 0);
}

size_t head_exact_shared(int n) { return (sizeof(HeadShared) + 15) / 16 * 16 + head_row_bytes(n); }

size_t head_logits_shared(int n, int tokens) { return tokens * head_row_bytes(n); }

void launch_head_repack(const HeadRepackArgs &args, Stream &stream) {
  const long long threads = (long long)args.tile_count * args.steps * kWave;
  launch(halo_head_repack, {(int)((threads + kHeadThreads - 1) / kHeadThreads)}, kHeadThreads, 0, stream, args);
}

void launch_head_norm(const HeadNormArgs &args, int tokens, Stream &stream) {
  launch(halo_head_norm, {tokens}, kHeadThreads, head_norm_shared(args.n), stream, args);
}

void launch_head_coarse(const HeadCoarseArgs &args, int blocks, Stream &stream) {
  const int tokens = head_coarse_tokens(args.count);
  const auto kernel = tokens == 16 ? halo_head_coarse_16 : tokens == 8 ? halo_head_coarse_8 : halo_head_coarse_1;
  launch(kernel, {blocks}, kHeadThreads, head_coarse_shared(args.own.n, tokens), stream, args);
}

void launch_head_exact(const HeadExactArgs &args, int tokens, int blocks, Stream &stream) {
  const auto kernel = args.rows.bf16 ? halo_head_exact_bf16 : halo_head_exact_f32;
  launch(kernel, {blocks, tokens}, kHeadThreads, head_exact_shared(args.n), stream, args);
}

void launch_head_near(const HeadNearArgs &args, int tokens, int blocks, Stream &stream) {
  const auto kernel = args.exact.rows.bf16 ? halo_head_near_bf16 : halo_head_near_f32;
  launch(kernel, {blocks, tokens}, kHeadThreads, head_exact_shared(args.exact.n), stream, args);
}

void launch_head_logits(const HeadLogitsArgs &args, int blocks, Stream &stream) {
  const int tokens = head_logits_tokens(args.count);
  auto kernel = tokens == 8 ? halo_head_logits_8_bf16 : tokens == 4 ? halo_head_logits_4_bf16 : halo_head_logits_1_bf16;
  if (!args.rows.bf16)
    kernel = tokens == 8 ? halo_head_logits_8_f32 : tokens == 4 ? halo_head_logits_4_f32 : halo_head_logits_1_f32;
  launch(kernel, {blocks}, kHeadThreads, head_logits_shared(args.n, tokens), stream, args);
}

}  // namespace halo
