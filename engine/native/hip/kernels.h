// The kernels as the host sees them: their arguments (one struct each, passed by value) and the functions that launch
// them. No device code: that is kernels.cpp and what it includes.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "layout.h"
#include "gpu_types.h"
#include "runtime.h"

namespace halo {

const int kThreads = 256;         // of a block
const int kWideThreads = 512;     // of a block that takes one row through norm, quantisation and product, and of attention
const int kMostDecode = 16;       // tokens that the decode kernels take at once
const uint32_t kNotFinite = 1;    // bits of the status word
const int kQueryParts = 4;        // blocks that a KV head's query heads are shared out among, at the most
const int kMostGroup = 16;        // query heads that share a KV head

// A ternary matrix on the device: layout.h. `rows` counts the rows that are there.
struct Matrix {
  const uint8_t *tiles;
  const float *scales;  // [rows]
  int rows, cols, tile_count, steps;
  Packing packing;
};

// int8 activations of some tokens: q [token][stride], zeros beyond the columns.
struct Int8Rows {
  int8_t *q;
  float *scale;
  int32_t *sum;  // of a row
  int stride;    // bytes, a multiple of 64
};

// What a step is asked for, in the host's memory: [token] each.
struct StepInputs {
  const int32_t *tokens, *slots, *positions;
};

// x[token][0..hidden) = row tokens[token] of the embedding; slots and positions to where the other kernels read them.
struct EmbedArgs {
  const uint8_t *rows;
  size_t row_bytes;
  int bf16, hidden, stride;
  StepInputs in;
  float *x;
  int32_t *slots, *positions;
  const float *rope_cos, *rope_sin;
  int rope_row;
  float *rope_now;  // [token][2][rope_row]
};

// Results to the host's memory.
struct PublishArgs {
  const int32_t *ids;
  uint32_t *status;  // cleared
  int count;
  int32_t *host_ids;
  uint32_t *host_status;
};

struct NormArgs {  // a block a token
  const float *x;
  int x_stride;
  const float *norm;  // null: none
  int n;
  float eps;
  Int8Rows out;
  int padded;  // columns that out must have
  uint32_t *status;
};

enum Epilogue { kStore = 0, kAdd = 1, kGated = 2 };  // out = y; out += y; out = activation(y[2 i]) * y[2 i + 1]

// `matrix` times the activations of `tokens` rows. Either x is taken through norm and quantisation by every block
// (one token, `q.q` null), or q holds them. `n` counts the columns that are there.
struct ProductArgs {
  const uint4 *tiles;
  const float *weight_scale;
  int rows, tile_count, steps;
  const float *x;
  const float *norm;
  int n;
  float eps;
  Int8Rows q;
  int tokens, x_stride, out_stride, activation, epilogue;
  float *out;
  uint32_t *status;
};

// The KV cache as the kernels see it.
struct KvView {
  uint8_t *data;   // [slot][layer][kv head][keys, values][half]
  float *scales;   // [slot][layer][kv head][keys, values][room], of the integer forms
  size_t half;     // bytes of the keys of one head
  int layers, kv_heads, head_dim, width, room;
};

// RoPE, KV append and attention over the cache of one layer. qkv [token][qkv_stride]: heads, kv_heads and kv_heads
// vectors of head_dim. `append`: the block that sees a token's position writes its key and value first (no other token of
// the batch may be of the same slot). Otherwise they are there.
struct AttentionArgs {
  const float *qkv;
  int qkv_stride;
  const int32_t *slots, *positions;
  int tokens, layer, heads, append;
  KvView kv;
  const float *rope_cos, *rope_sin;  // [position][rope_row]
  const float *rope_now;             // [token][2][rope_row]: of the tokens' own positions; null: not there
  int rope_row;
  float scale;  // 1 / sqrt(head_dim)
  float *out;   // [token][out_stride]: heads * head_dim
  int out_stride;
  float *partial;   // [token][kv head][block][group][width + 2]: sums, top, total
  int32_t *counts;  // [token][head], zero; zero again afterwards
  int blocks;       // of positions that partial has room for
  uint32_t *status;
};

// The CPU's tiles (engine/formats/tiles.py) of up to three matrices, whose rows follow one another or (of two) alternate,
// to the tiles of one Matrix.
struct RepackArgs {
  const uint8_t *first, *second, *third;
  int first_rows, second_rows, interleaved;
  int rows, cols, tile_count, steps;
  uint32_t *tiles;
};

// Of a block's shared memory: what a row of n activations, and what attention, must have at the least.
size_t least_row_bytes(int n);
size_t attention_bytes(int group, int width);

void launch_embed(const EmbedArgs &args, int tokens, Stream &stream);
void launch_publish(const PublishArgs &args, Stream &stream);
void launch_norm(const NormArgs &args, int tokens, Stream &stream);
void launch_product(const ProductArgs &args, Packing packing, Stream &stream);  // 1 to kMostDecode tokens
void launch_append(const AttentionArgs &args, KvStore form, Stream &stream);
void launch_attention(const AttentionArgs &args, KvStore form, Stream &stream);
void launch_repack(const RepackArgs &args, Packing packing, Stream &stream);

}  // namespace halo
