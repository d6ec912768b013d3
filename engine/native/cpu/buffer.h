// Zeroed memory straight from the kernel, for the arrays of a session. Pages that are never touched cost nothing.
#pragma once
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "failure.h"

namespace halo {

template <class T>
class Buffer {
 public:
  // Room for a * b elements. Throws Failure if the machine has not got it.
  Buffer(size_t a, size_t b) {
    if (__builtin_mul_overflow(a, b, &bytes_) || __builtin_mul_overflow(bytes_, sizeof(T), &bytes_))
      throw Failure(HALO_NO_MEMORY, "the session is larger than an address space");
    if (!bytes_) bytes_ = sizeof(T);
#ifdef HALO_SANITIZED  // from the heap, which sanitizers watch to the byte
    void *memory = nullptr;
    if (posix_memalign(&memory, 4096, bytes_))
      throw Failure(HALO_NO_MEMORY, "the session needs %zu bytes that are not there", bytes_);
    memset(memory, 0, bytes_);
    data_ = (T *)memory;
  }
  ~Buffer() { free((void *)data_); }
#else
    void *memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Failure(HALO_NO_MEMORY, "the session needs %zu bytes that are not there", bytes_);
    data_ = (T *)memory;
#ifdef MADV_HUGEPAGE
    madvise(memory, bytes_, MADV_HUGEPAGE);  // advice: where it fails, small pages do
#endif
  }
  ~Buffer() { munmap((void *)data_, bytes_); }
#endif
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  T *get() { return data_; }
  const T *get() const { return data_; }
  T &operator[](size_t index) { return data_[index]; }
  size_t bytes() const { return bytes_; }

 private:
  T *data_;
  size_t bytes_;
};

}  // namespace halo
