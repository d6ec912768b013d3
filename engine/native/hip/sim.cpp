// Fibers for sim.h: made with ucontext, switched with _setjmp, since swapcontext asks the kernel every time.
#include "sim.h"

#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <vector>

#include "../cpu/failure.h"

namespace halo::sim {

Place place;

namespace {

const size_t kStack = 64 << 10, kMostShared = 64 << 10;
const int kWaveThreads = 32, kMostThreads = 1024;
enum class State { runs, waits_wave, waits_block, done };

struct Fiber {
  jmp_buf at;
  ucontext_t first;
  bool started;
  State state;
};

struct Block {
  std::unique_ptr<Fiber[]> fibers{new Fiber[kMostThreads]};
  std::unique_ptr<uint8_t[]> stacks{new uint8_t[kStack * kMostThreads]};
  std::vector<uint8_t> shared;
  uint32_t slots[kMostThreads];
  int threads, current, live, waiting;
  int wave_live[kMostThreads / kWaveThreads], wave_waiting[kMostThreads / kWaveThreads];
  jmp_buf scheduler;
  ucontext_t home;
  const std::function<void()> *body;
};

Block &block_state() {
  static Block block;
  return block;
}

void release_wave(Block &b, int wave) {
  if (b.wave_waiting[wave] == 0 || b.wave_waiting[wave] < b.wave_live[wave]) return;
  b.wave_waiting[wave] = 0;
  for (int t = wave * kWaveThreads; t < (wave + 1) * kWaveThreads && t < b.threads; ++t)
    if (b.fibers[t].state == State::waits_wave) b.fibers[t].state = State::runs;
}

void release_block(Block &b) {
  if (b.waiting == 0 || b.waiting < b.live) return;
  b.waiting = 0;
  for (int t = 0; t < b.threads; ++t)
    if (b.fibers[t].state == State::waits_block) b.fibers[t].state = State::runs;
}

// Leave the fiber that runs until something has set it to `runs`.
void yield(Block &b) {
  Fiber &own = b.fibers[b.current];
  if (own.state == State::runs) return;
  if (_setjmp(own.at) == 0) _longjmp(b.scheduler, 1);
}

void fiber_main() {
  Block &b = block_state();
  (*b.body)();
  int t = b.current;
  b.fibers[t].state = State::done;
  --b.live;
  --b.wave_live[t / kWaveThreads];
  release_wave(b, t / kWaveThreads);
  release_block(b);
  _longjmp(b.scheduler, 1);
}

void resume(Block &b, int t) {
  b.current = t;
  place.thread = t;
  Fiber &fiber = b.fibers[t];
  if (_setjmp(b.scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.first);
}

void run_block(Block &b) {
  b.live = b.threads;
  b.waiting = 0;
  memset(b.wave_waiting, 0, sizeof b.wave_waiting);
  memset(b.wave_live, 0, sizeof b.wave_live);
  for (int t = 0; t < b.threads; ++t) {
    Fiber &fiber = b.fibers[t];
    fiber.started = false;
    fiber.state = State::runs;
    ++b.wave_live[t / kWaveThreads];
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = &b.stacks[kStack * t];
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, fiber_main, 0);
  }
  while (b.live) {
    bool ran = false;
    for (volatile int t = 0; t < b.threads; t = t + 1)
      while (b.fibers[t].state == State::runs) {
        ran = true;
        resume(b, t);
      }
    if (!ran) throw Failure(HALO_INTERNAL, "a simulated block waits at a barrier that not all of its threads reach");
  }
}

}  // namespace

void sync_block() {
  Block &b = block_state();
  b.fibers[b.current].state = State::waits_block;
  ++b.waiting;
  release_block(b);
  yield(b);
}

void sync_wave() {
  Block &b = block_state();
  int wave = b.current / kWaveThreads;
  b.fibers[b.current].state = State::waits_wave;
  ++b.wave_waiting[wave];
  release_wave(b, wave);
  yield(b);
}

uint32_t exchange(uint32_t x, int lane) {
  Block &b = block_state();
  int first = b.current / kWaveThreads * kWaveThreads;
  b.slots[b.current] = x;
  sync_wave();
  uint32_t got = b.slots[first + lane];
  sync_wave();
  return got;
}

void launch(const std::function<void()> &body, const int (&grid)[3], int threads, size_t shared_bytes) {
  static std::mutex one;
  std::lock_guard<std::mutex> lock(one);
  Block &b = block_state();
  if (threads < 1 || threads > kMostThreads || threads % kWaveThreads)
    throw Failure(HALO_INTERNAL, "a block of %d threads cannot be", threads);
  if (shared_bytes > kMostShared)
    throw Failure(HALO_INTERNAL, "a block wants %zu bytes of shared memory, and gfx1151 has %zu", shared_bytes, kMostShared);
  b.threads = threads;
  b.body = &body;
  place.blocks = grid[0];
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        b.shared.assign(shared_bytes + 16, 0xa5);  // on a device it holds anything
        place.shared = (uint8_t *)(((uintptr_t)b.shared.data() + 15) & ~(uintptr_t)15);
        place.block[0] = x, place.block[1] = y, place.block[2] = z;
        run_block(b);
      }
}

}  // namespace halo::sim
