// How the weights and the KV cache lie in the device's memory, for host and device alike. engine/formats/gpu_layout.py
// says the same in NumPy.
//
// Ternary matrix: tiles of 8 rows. A tile holds `steps` steps of 512 bytes, 16 for each lane of a wave: lane l has row
// l % 8 and part l / 8 of the step's columns, so a wave reads one step with one coalesced load. Codes are 0, 1, 2.
//   two bits   a step has 256 columns, a part 64. Byte b of word w has the codes of columns 16 w + 4 s + b at bits 2 s.
//   base three a step has 320 columns, a part 80. Byte b of word w has five codes of columns 20 w + 4 d + b, d = 0 to 4:
//              ceil(v * 256 / 243), v = sum of code d * 3^(4 - d); times 3, bits 8 and 9 are code 0, and so on.
// Either way four codes that come out together meet four neighbouring activations. Columns are filled up with code 1,
// rows with code 0. Rows of several matrices make one: q, k, v behind one another; gate and up in turns.
//
// KV cache of one slot, layer and KV head, `width` = head_dim filled up to 16, position p, element d:
//   f16     keys [p / 32][d / 8][p % 32][d % 8]        values [p / 8][d][p % 8]
//   int8    keys [p / 32][d / 16][p % 32][d % 16]      values [p / 16][d][p % 16]
//   rotor3  the order of int8, 16 codes together: their lower two bits in a word, code i at bits 2 i; the third bits in a
//           half-word, code i at bit i; all words of the keys, all half-words, then those of the values
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace halo {

const int kTileRows = 8;
const int kStepBytes = 512;
const int kBlockOfKv = 256;  // positions whose sums are made in one piece: attention_kernels.h of the CPU's

enum class Packing { two_bits, base_three };
enum class KvStore { f16, int8, rotor3 };

constexpr int step_cols(Packing packing) { return packing == Packing::two_bits ? 256 : 320; }

struct KvShape {
  KvStore form;
  int layers, kv_heads, head_dim, width, room;  // room: positions, a multiple of kBlockOfKv

  // Bytes of the keys of one (slot, layer, KV head); as many for its values.
  size_t half_bytes() const {
    size_t elements = (size_t)room * width;
    return form == KvStore::f16 ? 2 * elements : form == KvStore::int8 ? elements : elements / 16 * 6;
  }
};

}  // namespace halo
