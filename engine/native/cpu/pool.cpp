// The thread pool: spin briefly, then sleep.
#include "pool.h"

#include <fenv.h>

namespace halo {
namespace {

const int kSpins = 2000;  // tens of microseconds: longer than the gap between two phases, shorter than one between tokens

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {
    stop();
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread &worker : workers_) worker.join();
}

void Pool::run(int items, Function function, void *context) {
  if (workers_.empty() || items <= 1) {
    for (int item = 0; item < items; ++item) function(context, item, 0);
    return;
  }
  function_ = function;
  context_ = context;
  items_ = items;
  pending_ = items;
  uint64_t phase = (ticket_.load() >> 32) + 1;
  ticket_ = phase << 32 | (uint32_t)items;
  if (sleepers_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  while (help(0)) {
  }
  wait_for_items();
}

// Take one item and do it; false if none is left.
bool Pool::help(int thread) {
  uint64_t ticket = ticket_.load();
  do {
    if ((uint32_t)ticket == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1));
  function_(context_, items_ - (int)(uint32_t)ticket, thread);
  if (pending_.fetch_sub(1) == 1 && caller_sleeps_) {
    std::lock_guard<std::mutex> lock(mutex_);
    done_.notify_one();
  }
  return true;
}

void Pool::wait_for_items() {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (pending_ == 0) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_ = true;
  done_.wait(lock, [this] { return pending_ == 0; });
  caller_sleeps_ = false;
}

void Pool::work(int thread) {
  fesetenv(FE_DFL_ENV);
  int spin = 0;
  while (!stopping_) {
    if (help(thread)) {
      spin = 0;
    } else if (++spin < kSpins) {
      pause();
    } else {
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleepers_;
      wake_.wait(lock, [this] { return !idle() || stopping_; });
      --sleepers_;
      spin = 0;
    }
  }
}

}  // namespace halo
