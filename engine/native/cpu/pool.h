// A small thread pool for phases of a few microseconds. Not a task graph: one phase runs at a time.
//
// The items of a phase are handed out one by one in rising order, as memory is best read, to the caller too. So the
// caller never waits for a thread that has not come: where a neighbour holds a CPU, the others do its share, and a
// phase is late by one item at most.
#pragma once
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace halo {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int threads() const { return (int)workers_.size() + 1; }

  // Calls f(item, thread) for each item in 0..items-1, thread in 0..threads()-1, and returns when all are done.
  // f must not throw.
  template <class F>
  void each(int items, F f) {
    run(items, [](void *context, int item, int thread) { (*(F *)context)(item, thread); }, &f);
  }

 private:
  typedef void (*Function)(void *, int item, int thread);

  void run(int items, Function function, void *context);
  bool help(int thread);
  void work(int thread);
  void wait_for_items();
  bool idle() const { return (uint32_t)ticket_.load() == 0; }
  void stop();

  std::vector<std::thread> workers_;
  // High half: the number of the phase. Low half: the items not yet taken. The phase number makes a late taker's
  // compare-and-swap fail, so an item is only ever taken of the phase that is running.
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> pending_{0}, sleepers_{0};
  std::atomic<bool> stopping_{false}, caller_sleeps_{false};
  Function function_ = nullptr;  // this and the next two are written only while no item can be taken
  void *context_ = nullptr;
  int items_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
};

}  // namespace halo
