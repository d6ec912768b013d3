// The prefill kernels as the host sees them: their arguments, how a batch is cut for them, and the functions that launch
// them. No device code.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace halo {

// A ternary matrix times the int8 activations of many tokens. q: zeros from the columns to the end of the matrix's
// steps, rows and `q.q` on 16 bytes. `out` on 8 bytes, out_stride even.
struct GemmArgs {
  const uint8_t *tiles;
  const float *weight_scale;  // [rows]
  int rows, tile_count, steps;
  Int8Rows q;
  int tokens, out_stride;
  int epilogue, activation;
  float *out;
};

// Neighbouring tokens of a batch that share a slot and a block of 256 positions.
struct PrefillTile {
  int32_t first, count, slot, position;  // the first token, and its position
};

struct PrefillAttentionArgs {
  AttentionArgs base;        // slots, positions, append and what is for decoding alone are not read
  const PrefillTile *tiles;  // read by the device
  int tile_count;
  int query_units, query_bytes;  // set by the launch
};

const int kPrefillRows = 64;       // queries of a tile: its tokens times the query heads of a KV head
const int kMostPrefillWidth = 256;

// Cut a batch: tokens of one slot stand behind one another, positions rising by one. Long ones come first, since the
// last block of threads to end should be a short one.
inline std::vector<PrefillTile> plan_prefill(const int32_t *slots, const int32_t *positions, int count, int group) {
  const int most = kPrefillRows / group;
  std::vector<PrefillTile> tiles;
  for (int t = 0; t < count; ++t) {
    bool next = t == 0 || slots[t] != slots[t - 1] || positions[t] != positions[t - 1] + 1 ||
                positions[t] % kBlockOfKv == 0 || tiles.back().count == most;
    if (next) tiles.push_back({t, 0, slots[t], positions[t]});
    ++tiles.back().count;
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const PrefillTile &a, const PrefillTile &b) {
    return a.position / kBlockOfKv > b.position / kBlockOfKv;
  });
  return tiles;
}

void launch_gemm(const GemmArgs &args, Packing packing, Stream &stream);  // any number of tokens
// RoPE of the queries and attention; keys and values of all the tokens have been appended. Throws Failure for vectors
// wider than kMostPrefillWidth.
void launch_prefill_attention(const PrefillAttentionArgs &args, KvStore form, Stream &stream);

}  // namespace halo
