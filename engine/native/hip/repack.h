// The prepared file's ternary tiles (engine/formats/tiles.py, made for a CPU's vectors) to the device's (layout.h), on the
// device: once, at load. Device code.
#pragma once
#include "gpu.h"
#include "kernels.h"
#include "launch.h"

namespace halo {

const int kCpuRows = 16, kCpuCols = 96, kCpuChunk = 320;

// The code of one weight in tiles of `chunks` chunks a row block.
GPU_DEVICE uint32_t code_in_tiles(const uint8_t *tiles, int chunks, int row, int col) {
  const uint8_t *chunk = tiles + ((size_t)(row / kCpuRows) * chunks + col / kCpuCols) * kCpuChunk;
  const int in = col % kCpuCols, vector = in / 12, plane = in % 12 / 4, lane = row % kCpuRows * 4 + in % 4;
  const uint32_t index = (chunk[64 * (vector / 2) + lane] >> 4 * (vector % 2) & 15) | (chunk[256 + lane] >> vector & 1) << 4;
  return plane == 0 ? index % 3 : plane == 1 ? index / 3 % 3 : index / 9;
}

GPU_DEVICE uint32_t code_of_row(const RepackArgs &a, int row, int col) {
  if (row >= a.rows) return 0;
  if (col >= a.cols) return 1;
  const uint8_t *source = a.first;
  if (a.interleaved) {
    source = row % 2 ? a.second : a.first;
    row /= 2;
  } else if (row >= a.first_rows + a.second_rows) {
    source = a.third;
    row -= a.first_rows + a.second_rows;
  } else if (row >= a.first_rows) {
    source = a.second;
    row -= a.first_rows;
  }
  return code_in_tiles(source, (a.cols + kCpuCols - 1) / kCpuCols, row, col);
}

template <bool kBaseThree>
GPU_DEVICE void repack(const RepackArgs &a) {
  const size_t word = (size_t)block_id() * kThreads + thread_id();
  if (word >= (size_t)a.tile_count * a.steps * (kStepBytes / 4)) return;
  const int in = (int)(word % (kStepBytes / 4)), lane = in / 4, number = in % 4;
  const size_t step = word / (kStepBytes / 4);
  const int row = (int)(step / a.steps) * kTileRows + lane % kTileRows;
  const int each = kBaseThree ? 20 : 16;
  const int col = (int)(step % a.steps) * (kBaseThree ? 320 : 256) + lane / kTileRows * 4 * each + number * each;
  uint32_t result = 0;
  for (int b = 0; b < 4; ++b) {
    uint32_t byte = 0;
    if (kBaseThree) {
      for (int d = 0; d < 5; ++d) byte = 3 * byte + code_of_row(a, row, col + 4 * d + b);
      byte = (byte * 256 + 242) / 243;
    } else {
      for (int s = 0; s < 4; ++s) byte |= code_of_row(a, row, col + 4 * s + b) << 2 * s;
    }
    result |= byte << 8 * b;
  }
  a.tiles[word] = result;
}

GPU_KERNEL(kThreads) halo_repack_two(RepackArgs a) { repack<false>(a); }
GPU_KERNEL(kThreads) halo_repack_three(RepackArgs a) { repack<true>(a); }

inline void launch_repack_kernel(const RepackArgs &args, Packing packing, Stream &stream) {
  const size_t words = (size_t)args.tile_count * args.steps * (kStepBytes / 4);
  launch(packing == Packing::base_three ? halo_repack_three : halo_repack_two, {(int)((words + kThreads - 1) / kThreads)},
         kThreads, 0, stream, args);
}

}  // namespace halo
