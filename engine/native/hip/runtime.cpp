// runtime.h for HIP, CUDA and the simulation. The errors' sentences are made here; their statuses are the ABI's.
#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "../cpu/failure.h"

#if defined(HALO_SIM)
#include "sim.h"
#elif defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
#include <hip/hip_runtime.h>
#define GPU(name) hip##name
#else
#include <cuda_runtime.h>
#define GPU(name) cuda##name
#endif

#ifndef HALO_TARGETS
#define HALO_TARGETS ""
#endif

namespace halo {
namespace {

const size_t kReserve = (size_t)256 << 20;  // of the host's memory: what nobody may take from a machine that lives on

// A number in a file of sysfs or procfs; 0 if there is none.
size_t number_in(const char *path, const char *name) {
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  char line[256];
  size_t value = 0;
  while (fgets(line, sizeof line, file)) {
    if (name && strncmp(line, name, strlen(name))) continue;
    value = strtoull(line + (name ? strlen(name) : 0), nullptr, 10);
    break;
  }
  fclose(file);
  return value;
}

[[maybe_unused]] size_t available_memory() { return number_in("/proc/meminfo", "MemAvailable:") << 10; }

}  // namespace

#if defined(HALO_SIM)

// The faults that a device can have, by HALO_SIM_FAULT: "none" (no device), "code" (no code for it), "memory=BYTES" (that
// it has no more), "lost=N" (after N kernels).
namespace {

struct Simulation {
  size_t used = 0, most = (size_t)1 << 40;
  long kernels = 0, lost_after = -1;
  Simulation() {
    const char *fault = getenv("HALO_SIM_FAULT");
    if (!fault) return;
    if (!strcmp(fault, "none")) throw Failure(HALO_UNSUPPORTED, "there is no GPU here that the driver knows");
    if (!strcmp(fault, "code"))
      throw Failure(HALO_UNSUPPORTED, "this library has code for %s, and this GPU is a simulated one", "gfx1151");
    if (!strncmp(fault, "memory=", 7)) most = strtoull(fault + 7, nullptr, 10);
    if (!strncmp(fault, "lost=", 5)) lost_after = strtol(fault + 5, nullptr, 10);
  }
};

Simulation &simulation() {
  static std::unique_ptr<Simulation> own = std::make_unique<Simulation>();
  return *own;
}

struct Recording {
  std::vector<std::function<void()>> work;
};

struct SimStream {
  Recording *recording = nullptr;
};

}  // namespace

const DeviceFacts &device() {
  simulation();
  static const DeviceFacts facts = {"sim", "simulated", "sim", 3, 64 << 10, true};
  return facts;
}

MemoryFacts device_memory() {
  Simulation &s = simulation();
  return {s.most - std::min(s.used, s.most), s.most};
}

void sim_enqueue(Stream &stream, std::function<void()> work) {
  SimStream &own = *(SimStream *)stream.handle();
  if (own.recording) {
    own.recording->work.push_back(std::move(work));
    return;
  }
  Simulation &s = simulation();
  if (s.lost_after >= 0 && s.kernels++ >= s.lost_after)
    throw Failure(HALO_LOST, "the GPU was lost: a kernel did not end well");
  work();
}

namespace {

void *take(size_t bytes) {
  void *memory = nullptr;
  if (posix_memalign(&memory, 256, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  memset(memory, 0, bytes);
  simulation().used += bytes;
  return memory;
}

void give(void *memory, size_t bytes) {
  if (memory) simulation().used -= bytes;
  free(memory);
}

}  // namespace

SharedBytes::SharedBytes(size_t bytes) {
  simulation();
  host_ = calloc(1, std::max<size_t>(bytes, 1));
  if (!host_) throw std::bad_alloc();
  device_ = host_;
}
SharedBytes::~SharedBytes() { free(host_); }

Stream::Stream() : handle_(new SimStream) { simulation(); }
Stream::~Stream() { delete (SimStream *)handle_; }
void Stream::copy_in(void *device, const void *host, size_t bytes) {
  sim_enqueue(*this, [=] { memcpy(device, host, bytes); });
}
void Stream::copy_out(void *host, const void *device, size_t bytes) {
  sim_enqueue(*this, [=] { memcpy(host, device, bytes); });
}
void Stream::clear(void *device, size_t bytes) {
  sim_enqueue(*this, [=] { memset(device, 0, bytes); });
}
void Stream::copy_rows(void *to, const void *from, size_t pitch, size_t bytes, size_t rows) {
  sim_enqueue(*this, [=] {
    for (size_t i = 0; i < rows; ++i) memcpy((uint8_t *)to + i * pitch, (const uint8_t *)from + i * pitch, bytes);
  });
}
void Stream::sync() {}

Graph Stream::capture(const std::function<void()> &work) {
  auto recording = std::make_unique<Recording>();
  ((SimStream *)handle_)->recording = recording.get();
  try {
    work();
  } catch (...) {
    ((SimStream *)handle_)->recording = nullptr;
    throw;
  }
  ((SimStream *)handle_)->recording = nullptr;
  Graph graph;
  graph.nodes_ = (int)recording->work.size();
  graph.handle_ = recording.release();
  return graph;
}

void Stream::run(const Graph &graph) {
  for (const std::function<void()> &work : ((Recording *)graph.handle_)->work) sim_enqueue(*this, work);
}

Graph::~Graph() { delete (Recording *)handle_; }

#else

typedef GPU(Error_t) Error;

// Every error of the runtime as the ABI's status and a sentence.
[[noreturn]] void throw_device_error(int code, const char *what) {
  Error error = (Error)code;
  const char *words = GPU(GetErrorString)(error);
  switch (code) {
    case 2:  // out of memory
      throw Failure(HALO_NO_MEMORY, "%s: the GPU's memory is used up", what);
    case 35: case 100: case 101: case 3:  // driver too old, no device, no such device, not initialised
      throw Failure(HALO_UNSUPPORTED, "there is no GPU here that the driver knows (%s)", words);
    case 98: case 200: case 209:  // no such function, no image, no binary for this GPU
      throw Failure(HALO_UNSUPPORTED, "%s: this library has code for %s only (%s)", what, HALO_TARGETS, words);
    default:
      throw Failure(HALO_LOST, "the GPU was lost: %s (%s)", what, words);
  }
}

namespace {

void need(Error error, const char *what) {
  if (error != GPU(Success)) throw_device_error((int)error, what);
}

DeviceFacts find_device() {
  int count = 0;
  need(GPU(GetDeviceCount)(&count), "the GPUs cannot be counted");
  if (count < 1) throw Failure(HALO_UNSUPPORTED, "there is no GPU here that the driver knows");
#if defined(__HIP_PLATFORM_AMD__)
  hipDeviceProp_t properties;
  need(hipGetDeviceProperties(&properties, 0), "the GPU's properties cannot be read");
  std::string arch = properties.gcnArchName;
  arch = arch.substr(0, arch.find(':'));
  if (std::string(HALO_TARGETS).find(arch) == std::string::npos)
    throw Failure(HALO_UNSUPPORTED, "this library has code for %s, and this GPU is %s", HALO_TARGETS, arch.c_str());
  size_t shared = properties.sharedMemPerBlock;
  const char *backend = "hip";
#else
  cudaDeviceProp properties;
  need(cudaGetDeviceProperties(&properties, 0), "the GPU's properties cannot be read");
  std::string arch = "sm_" + std::to_string(properties.major * 10 + properties.minor);
  size_t shared = properties.sharedMemPerBlockOptin;
  const char *backend = "cuda";
#endif
  need(GPU(SetDevice)(0), "the GPU cannot be opened");
  // A step waits for the device once; waiting busily is what costs least time, and a server has little else to do then.
  return {backend, properties.name, arch, properties.multiProcessorCount, shared, properties.integrated != 0};
}

// What an APU's allocations can have: the kernel's own count of what the GPU may map, and what the machine has left. The
// runtime's totals are wrong there by up to a factor of four.
bool apu_memory(MemoryFacts *facts) {
  for (int card = 0; card < 8; ++card) {
    std::string base = "/sys/class/drm/card" + std::to_string(card) + "/device/mem_info_";
    size_t gtt = number_in((base + "gtt_total").c_str(), nullptr), vram = number_in((base + "vram_total").c_str(), nullptr);
    if (!gtt) continue;
    // GTT and VRAM overlap; allocations go to the larger pool.
    const char *pool = gtt > vram ? "gtt" : "vram";
    size_t total = std::max(gtt, vram), used = number_in((base + pool + "_used").c_str(), nullptr);
    size_t left = total - std::min(used, total);
    if (gtt > vram) {
      size_t host = available_memory();  // 0: a container that hides it
      if (host) left = std::min(left, host - std::min(kReserve, host));
    }
    *facts = {left, total};
    return true;
  }
  return false;
}

void *take(size_t bytes) {
  device();
  void *memory = nullptr;
  need(GPU(Malloc)(&memory, std::max<size_t>(bytes, 16)), "memory cannot be taken");
  // Clearing goes on behind the host's back, in another order than what our streams do: so it is waited for.
  Error error = GPU(Memset)(memory, 0, bytes);
  if (error == GPU(Success)) error = GPU(StreamSynchronize)(nullptr);
  if (error != GPU(Success)) {
    (void)GPU(Free)(memory);
    need(error, "memory cannot be cleared");
  }
  return memory;
}

void give(void *memory, size_t) {
  if (memory) (void)GPU(Free)(memory);
}

GPU(Stream_t) stream_of(const Stream &stream) { return (GPU(Stream_t))stream.handle(); }

}  // namespace

const DeviceFacts &device() {
  static std::mutex one;
  static std::unique_ptr<DeviceFacts> facts;
  std::lock_guard<std::mutex> lock(one);
  if (!facts) facts = std::make_unique<DeviceFacts>(find_device());
  return *facts;
}

MemoryFacts device_memory() {
  MemoryFacts facts = {0, 0};
  if (device().unified && apu_memory(&facts)) return facts;
  need(GPU(MemGetInfo)(&facts.free, &facts.total), "the GPU's memory cannot be measured");
  return facts;
}

SharedBytes::SharedBytes(size_t bytes) {
  device();
#if defined(__HIP_PLATFORM_AMD__)
  need(hipHostMalloc(&host_, std::max<size_t>(bytes, 16), hipHostMallocMapped), "the host's memory cannot be shared");
  need(hipHostGetDevicePointer(&device_, host_, 0), "the host's memory cannot be shared");
#else
  need(cudaHostAlloc(&host_, std::max<size_t>(bytes, 16), cudaHostAllocMapped), "the host's memory cannot be shared");
  need(cudaHostGetDevicePointer(&device_, host_, 0), "the host's memory cannot be shared");
#endif
  memset(host_, 0, bytes);
}

SharedBytes::~SharedBytes() {
#if defined(__HIP_PLATFORM_AMD__)
  (void)hipHostFree(host_);
#else
  (void)cudaFreeHost(host_);
#endif
}

Stream::Stream() {
  device();
  GPU(Stream_t) stream;
  need(GPU(StreamCreateWithFlags)(&stream, GPU(StreamNonBlocking)), "a stream cannot be made");
  handle_ = (void *)stream;
}

Stream::~Stream() { (void)GPU(StreamDestroy)(stream_of(*this)); }

void Stream::copy_in(void *device, const void *host, size_t bytes) {
  need(GPU(MemcpyAsync)(device, host, bytes, GPU(MemcpyHostToDevice), stream_of(*this)), "a copy to the GPU failed");
}

void Stream::copy_out(void *host, const void *device, size_t bytes) {
  need(GPU(MemcpyAsync)(host, device, bytes, GPU(MemcpyDeviceToHost), stream_of(*this)), "a copy from the GPU failed");
}

void Stream::clear(void *device, size_t bytes) {
  need(GPU(MemsetAsync)(device, 0, bytes, stream_of(*this)), "memory cannot be cleared");
}

void Stream::copy_rows(void *to, const void *from, size_t pitch, size_t bytes, size_t rows) {
  need(GPU(Memcpy2DAsync)(to, pitch, from, pitch, bytes, rows, GPU(MemcpyDeviceToDevice), stream_of(*this)),
       "a copy on the GPU failed");
}

void Stream::sync() { need(GPU(StreamSynchronize)(stream_of(*this)), "a kernel did not end well"); }

Graph Stream::capture(const std::function<void()> &work) {
  GPU(Graph_t) graph = nullptr;
  need(GPU(StreamBeginCapture)(stream_of(*this), GPU(StreamCaptureModeThreadLocal)), "a graph cannot be begun");
  try {
    work();
  } catch (...) {
    (void)GPU(StreamEndCapture)(stream_of(*this), &graph);
    if (graph) (void)GPU(GraphDestroy)(graph);
    throw;
  }
  need(GPU(StreamEndCapture)(stream_of(*this), &graph), "a graph cannot be captured");
  size_t nodes = 0;
  GPU(GraphExec_t) made = nullptr;
  Error error = GPU(GraphGetNodes)(graph, nullptr, &nodes);
  if (error == GPU(Success)) error = GPU(GraphInstantiateWithFlags)(&made, graph, 0);
  (void)GPU(GraphDestroy)(graph);
  need(error, "a graph cannot be made");
  Graph result;
  result.handle_ = (void *)made;
  result.nodes_ = (int)nodes;
  return result;
}

void Stream::run(const Graph &graph) {
  need(GPU(GraphLaunch)((GPU(GraphExec_t))graph.handle_, stream_of(*this)), "a graph cannot be started");
}

Graph::~Graph() {
  if (handle_) (void)GPU(GraphExecDestroy)((GPU(GraphExec_t))handle_);
}

#endif

DeviceBytes::DeviceBytes(size_t bytes, const char *what) : bytes_(bytes) {
  MemoryFacts memory = device_memory();
  if (bytes > memory.free)
    throw Failure(HALO_NO_MEMORY, "%s needs %.1f MB of the GPU's memory, and %.1f of %.1f MB are free", what, bytes / 1e6,
                  memory.free / 1e6, memory.total / 1e6);
  data_ = take(bytes);
}

DeviceBytes::~DeviceBytes() { give(data_, bytes_); }
DeviceBytes::DeviceBytes(DeviceBytes &&other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr; }
DeviceBytes &DeviceBytes::operator=(DeviceBytes &&other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Graph::Graph(Graph &&other) noexcept : handle_(other.handle_), nodes_(other.nodes_) { other.handle_ = nullptr; }
Graph &Graph::operator=(Graph &&other) noexcept {
  std::swap(handle_, other.handle_);
  std::swap(nodes_, other.nodes_);
  return *this;
}

}  // namespace halo
