// One head of the KV cache: how a token's key and value are turned, quantised and written, how queries are prepared, and
// how the attention reads. layout.h has the order; cpu/cache.cpp and engine/kv_forms.py the arithmetic. Device code.
#pragma once
#include "arithmetic.h"
#include "kernels.h"

namespace halo {

GPU_DEVICE uint32_t word_at(const uint4 &w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

// Lloyd-Max's eight levels: 13, 40, 71, 114 and their negatives, as bytes.
const uint32_t kLevelsUp = 0x7247280du, kLevelsDown = 0x8eb9d8f3u;

struct KvHead {
  uint8_t *keys, *values;
  float *key_scales, *value_scales;
  size_t words;  // rotor3: bytes of the words before the half-words
};

GPU_DEVICE KvHead kv_head(const KvView &kv, int slot, int layer, int head, KvStore form) {
  const size_t index = ((size_t)slot * kv.layers + layer) * kv.kv_heads + head;
  KvHead h;
  h.keys = kv.data + 2 * index * kv.half;
  h.values = h.keys + kv.half;
  h.key_scales = form == KvStore::f16 ? nullptr : kv.scales + 2 * index * kv.room;
  h.value_scales = form == KvStore::f16 ? nullptr : h.key_scales + kv.room;
  h.words = (size_t)kv.room * kv.width / 4;
  return h;
}

// Round to float16, nearest even; |x| is at most 65504.
GPU_DEVICE uint32_t to_half(float x) {
  x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size < 0x38800000) return sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000);  // subnormal: its unit is 2^-24
  size += 0xfff + (size >> 13 & 1);
  return sign | (size - (112u << 23)) >> 13;
}

GPU_DEVICE float half_of(uint32_t h) {
  uint32_t sign = (h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest < 0x400) return (sign ? -1.0f : 1.0f) * ((float)rest * 5.9604644775390625e-8f);
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

// Sixteen codes of three bits as the bytes of their levels.
GPU_DEVICE uint4 levels_of(uint32_t low, uint32_t high) {
  uint32_t codes[4];
  GPU_UNROLL
  for (int k = 0; k < 4; ++k) {
    uint32_t two = low >> 8 * k & 255, one = high >> 4 * k & 15;
    uint32_t c = (two & 3) | (two & 12) << 6 | (two & 48) << 12 | (two & 192) << 18;
    codes[k] = c | (one & 1) << 2 | (one & 2) << 9 | (one & 4) << 16 | (one & 8) << 23;
  }
  return make_uint4(pick_bytes(kLevelsUp, kLevelsDown, codes[0]), pick_bytes(kLevelsUp, kLevelsDown, codes[1]),
                    pick_bytes(kLevelsUp, kLevelsDown, codes[2]), pick_bytes(kLevelsUp, kLevelsDown, codes[3]));
}

// Number of the 16 codes (of the 8 halves) that hold elements 16 c and on (8 c) of a position's key.
GPU_DEVICE size_t key_chunk_index(int width, int each, int position, int chunk) {
  return ((size_t)(position / 32) * (width / each) + chunk) * 32 + position % 32;
}

template <KvStore kForm>
GPU_DEVICE uint4 kv_key_chunk(const KvHead &kv, int width, int position, int chunk) {
  const size_t at = key_chunk_index(width, kForm == KvStore::f16 ? 8 : 16, position, chunk);
  if (kForm != KvStore::rotor3) return ((const uint4 *)kv.keys)[at];
  return levels_of(((const uint32_t *)kv.keys)[at], ((const uint16_t *)(kv.keys + kv.words))[at]);
}

// Element d of the 16 positions (8 of f16) that `position` begins.
template <KvStore kForm>
GPU_DEVICE uint4 kv_value_chunk(const KvHead &kv, int width, int position, int d) {
  const size_t at = (size_t)(position / (kForm == KvStore::f16 ? 8 : 16)) * width + d;
  if (kForm != KvStore::rotor3) return ((const uint4 *)kv.values)[at];
  return levels_of(((const uint32_t *)kv.values)[at], ((const uint16_t *)(kv.values + kv.words))[at]);
}

// The sign of element i of a rotated vector: engine/kv_forms.py, signs.
GPU_DEVICE float rotation_sign(int i) {
  uint64_t z = (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return (z ^ (z >> 31)) >> 63 ? -1.0f : 1.0f;
}

// The Walsh-Hadamard transform of `rows` vectors of n floats (a power of two) in shared memory, by the block.
GPU_DEVICE void hadamard(float *x, int rows, int n) {
  for (int half = 1; half < n; half *= 2) {
    for (int i = thread_id(); i < rows * n / 2; i += kWideThreads) {
      const int low = i / half * 2 * half + i % half;
      float a = x[low], b = x[low + half];
      x[low] = a + b;
      x[low + half] = a - b;
    }
    sync_block();
  }
}

GPU_DEVICE void turn(float *x, int rows, int n) {
  for (int i = thread_id(); i < rows * n; i += kWideThreads) x[i] = x[i] * rotation_sign(i % n);
  sync_block();
  hadamard(x, rows, n);
}

GPU_DEVICE void turn_back(float *x, int rows, int n) {
  hadamard(x, rows, n);
  for (int i = thread_id(); i < rows * n; i += kWideThreads) x[i] = x[i] * rotation_sign(i % n);
  sync_block();
}

// A float that the attention can bear, else 0, and the status says so.
GPU_DEVICE float taken(float x, uint32_t *status) {
  if (size_bits(x) < kTooLargeBits) return x;
  atomic_or(status, kNotFinite);
  return 0.0f;
}

// One pair of elements of a vector of head_dim, turned by the token's position, to `to`, shared.
GPU_DEVICE void take_pair(const AttentionArgs &a, const float *from, const float *cosine, const float *sine, int e, float *to) {
  const int half = a.kv.head_dim / 2;
  float x = from[e], y = from[e + half];
  const float c = cosine[e], s = sine[e];
  x = taken(x, a.status), y = taken(y, a.status);
  to[e] = x * c - y * s;
  to[e + half] = y * c + x * s;
}

// Vectors to `raw`, shared, [row][width], filled up with zeros: `queries` query heads from `first` on and (`writes`) the new
// key, turned by the token's position, and the new value. All are asked for at once. The block does not meet at the end.
GPU_DEVICE void take_vectors(const AttentionArgs &a, int token, int head, int first, int queries, bool writes, float *raw) {
  const int width = a.kv.width, size = a.kv.head_dim, half = size / 2;
  const float *qkv = a.qkv + (size_t)token * a.qkv_stride;
  const float *cosine = a.rope_now + (size_t)token * 2 * a.rope_row, *sine = cosine + a.rope_row;
  const int pairs = (queries + writes) * half;
  for (int i = thread_id(); i < pairs + (writes ? size : 0); i += kWideThreads) {
    if (i < pairs) {
      const int row = i / half, from = row < queries ? first + row : a.heads + head;
      take_pair(a, qkv + (size_t)from * size, cosine, sine, i % half, raw + row * width);
    } else {
      raw[(queries + 1) * width + i - pairs] =
          taken(qkv[(size_t)(a.heads + a.kv.kv_heads + head) * size + i - pairs], a.status);
    }
  }
  const int pad = width - size;
  for (int i = thread_id(); i < (queries + 2 * writes) * pad; i += kWideThreads) raw[i / pad * width + size + i % pad] = 0.0f;
}

// The largest size of a vector in shared memory; every lane of the wave gets it.
GPU_DEVICE float wave_largest(const float *x, int n) {
  uint32_t most = 0;
  for (int i = lane_id(); i < n; i += kWave) most = size_bits(x[i]) > most ? size_bits(x[i]) : most;
  return float_of(wave_max(most));
}

// One query (shared, turned by its position and by the form), by a wave: int8 in q8, its scale returned to all lanes.
template <KvStore kForm>
GPU_DEVICE float quantize_query(const float *x, int width, int size, float attention_scale, int8_t *q8) {
  float most = wave_largest(x, width);
  most = most > 1e-30f ? most : 1e-30f;
  const float factor = 127.0f / most;
  for (int i = lane_id(); i < width; i += kWave) q8[i] = (int8_t)nearest(x[i] * factor);
  return most / 127.0f * (kForm == KvStore::rotor3 ? attention_scale / (float)size : attention_scale);
}

GPU_DEVICE void put_bits(uint32_t *word, int shift, uint32_t mask, uint32_t value) {
  atomic_and(word, ~(mask << shift));
  atomic_or(word, value << shift);
}

// The codes of rotor3 of one vector (turned, shared), by a wave; its scale.
GPU_DEVICE float rotor3_codes(const float *x, int n, uint8_t *codes) {
  const int lane = lane_id();
  float squares = 0.0f, products = 0.0f;
  for (int i = lane % 16; i < n; i += 16) squares = fused(x[i], x[i], squares);
  const float rms = root(add_lanes(squares) / (float)n);
  const float first = 0.5006f * rms, second = 1.0500f * rms, third = 1.7480f * rms;
  int level_squares = 0;
  for (int i = lane % 16; i < n; i += 16) {
    const float size = float_of(size_bits(x[i]));
    const int m = (size > first) + (size > second) + (size > third);
    const int level = m == 0 ? 13 : m == 1 ? 40 : m == 2 ? 71 : 114;
    codes[i] = (uint8_t)(m + (x[i] < 0.0f ? 4 : 0));  // both half-waves write the same
    level_squares += level * level;
    products = fused(x[i], x[i] < 0.0f ? -(float)level : (float)level, products);
  }
  for (int half = 8; half; half /= 2) level_squares += shuffle_xor(level_squares, half);
  return add_lanes(products) / (float)level_squares;
}

// One key (which = 0) or value (1) of a token (shared, turned by its position and by the form), by a wave: its codes into
// `codes`, shared, and (`stores`) into the cache; its scale too.
template <KvStore kForm>
GPU_DEVICE float put_vector(const KvHead &kv, int which, const float *x, int width, int position, uint8_t *codes, bool stores) {
  float scale;
  uint8_t *base = which == 0 ? kv.keys : kv.values;
  if (kForm == KvStore::int8) {
    float most = wave_largest(x, width);
    most = most > 1e-30f ? most : 1e-30f;
    const float factor = 127.0f / most;
    scale = most / 127.0f;
    for (int d = lane_id(); d < width; d += kWave) {
      const uint8_t code = (uint8_t)(int8_t)nearest(x[d] * factor);
      codes[d] = code;
      if (!stores) continue;
      if (which == 0) base[key_chunk_index(width, 16, position, d / 16) * 16 + d % 16] = code;
      if (which == 1) base[((size_t)(position / 16) * width + d) * 16 + position % 16] = code;
    }
  } else {
    scale = rotor3_codes(x, width, codes);
    sync_wave();
    for (int d = lane_id(); d < width; d += kWave) {
      const uint32_t code = codes[d];
      const size_t at = which == 0 ? key_chunk_index(width, 16, position, d / 16) : (size_t)(position / 16) * width + d;
      const int i = which == 0 ? d % 16 : position % 16;
      if (stores) {
        put_bits((uint32_t *)base + at, 2 * i, 3, code & 3);
        put_bits((uint32_t *)(base + kv.words) + at / 2, (int)(at % 2) * 16 + i, 1, code >> 2);
      }
      codes[d] = (uint8_t)(pick_bytes(kLevelsUp, kLevelsDown, code));  // from here on the level
    }
  }
  if (stores && lane_id() == 0) (which == 0 ? kv.key_scales : kv.value_scales)[position] = scale;
  return scale;
}

// A key and a value (shared: [2][width]) as halves into the cache.
GPU_DEVICE void put_halves(const KvHead &kv, const float *key_and_value, int width, int position) {
  uint16_t *keys = (uint16_t *)kv.keys, *values = (uint16_t *)kv.values;
  for (int d = thread_id(); d < width; d += kWideThreads) {
    keys[key_chunk_index(width, 8, position, d / 8) * 8 + d % 8] = (uint16_t)to_half(key_and_value[d]);
    values[((size_t)(position / 8) * width + d) * 8 + position % 8] = (uint16_t)to_half(key_and_value[width + d]);
  }
}

// Write one token's key and value of one head. raw, shared, has [2][width] floats and 2 * width bytes behind them.
template <KvStore kForm>
GPU_DEVICE void append_token(const AttentionArgs &a, const KvHead &kv, int token, int head, float *raw) {
  const int width = a.kv.width, position = a.positions[token];
  take_vectors(a, token, head, 0, 0, true, raw);
  sync_block();
  if (kForm == KvStore::f16) {
    put_halves(kv, raw, width, position);
    return;
  }
  if (kForm == KvStore::rotor3) turn(raw, 2, width);
  const int which = wave_id();
  if (which < 2) put_vector<kForm>(kv, which, raw + which * width, width, position, (uint8_t *)(raw + 2 * width) + which * width, true);
}

}  // namespace halo
