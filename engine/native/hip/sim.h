// The device simulated on the CPU: each thread of a block is a fiber, blocks run one after another. It knows nothing of
// time. Barriers and exchanges behave as on a GPU, a wave's threads that part ways included; a block that waits for
// threads which never come is reported, not hung.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace halo::sim {

struct Place {
  int thread, block[3], blocks;
  uint8_t *shared;
};
extern Place place;  // of the fiber that runs

inline int thread() { return place.thread; }
inline int block(int axis) { return place.block[axis]; }
inline int blocks() { return place.blocks; }
inline uint8_t *shared() { return place.shared; }
void sync_block();
void sync_wave();
uint32_t exchange(uint32_t x, int lane);  // x of another lane of the wave

// Runs `body` for every thread of every block. Throws Failure if a block deadlocks.
void launch(const std::function<void()> &body, const int (&grid)[3], int threads, size_t shared_bytes);

}  // namespace halo::sim
