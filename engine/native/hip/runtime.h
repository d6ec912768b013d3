// The device's runtime as the host code sees it: memory, a stream, a graph. The same for HIP, CUDA and the simulation.
// Every failure is thrown as a Failure with the ABI's status.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>

namespace halo {

struct DeviceFacts {
  std::string backend, name, arch;  // "hip", "AMD Radeon 8060S", "gfx1151"
  int multiprocessors;
  size_t shared_bytes;  // that a block may have
  bool unified;         // host and device share the memory
};

// The one device that is used. Throws Failure(HALO_UNSUPPORTED) without one, or without code for it.
const DeviceFacts &device();

struct MemoryFacts {
  size_t free, total;  // bytes that allocations can have, as the kernel tells it where the runtime's word cannot be taken
};
MemoryFacts device_memory();

// Device memory, zeroed.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  DeviceBytes(size_t bytes, const char *what);  // throws Failure(HALO_NO_MEMORY) before the driver does
  ~DeviceBytes();
  DeviceBytes(DeviceBytes &&other) noexcept;
  DeviceBytes &operator=(DeviceBytes &&other) noexcept;
  template <class T = uint8_t>
  T *as() const {
    return (T *)data_;
  }
  size_t bytes() const { return bytes_; }

 private:
  void *data_ = nullptr;
  size_t bytes_ = 0;
};

// The host's memory that the device reads and writes as well.
class SharedBytes {
 public:
  explicit SharedBytes(size_t bytes);
  ~SharedBytes();
  SharedBytes(const SharedBytes &) = delete;
  SharedBytes &operator=(const SharedBytes &) = delete;
  template <class T = uint8_t>
  T *host() const {
    return (T *)host_;
  }
  template <class T = uint8_t>
  T *device() const {
    return (T *)device_;
  }

 private:
  void *host_ = nullptr, *device_ = nullptr;
};

class Graph;

// Kernels and copies in order.
class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream &) = delete;
  Stream &operator=(const Stream &) = delete;
  void copy_in(void *device, const void *host, size_t bytes);   // the host's memory must stay until sync()
  void copy_out(void *host, const void *device, size_t bytes);
  void clear(void *device, size_t bytes);
  // Within the device: `bytes` of each of `rows` rows, `pitch` bytes apart in both.
  void copy_rows(void *to, const void *from, size_t pitch, size_t bytes, size_t rows);
  void sync();  // throws Failure if anything before failed; after HALO_LOST nothing more can be done with the device
  Graph capture(const std::function<void()> &work);  // what `work` puts on this stream, not run
  void run(const Graph &graph);
  void *handle() const { return handle_; }

 private:
  void *handle_ = nullptr;
};

class Graph {
 public:
  Graph() = default;
  ~Graph();
  Graph(Graph &&other) noexcept;
  Graph &operator=(Graph &&other) noexcept;
  explicit operator bool() const { return handle_ != nullptr; }
  int nodes() const { return nodes_; }

 private:
  friend class Stream;
  void *handle_ = nullptr;
  int nodes_ = 0;
};

}  // namespace halo
