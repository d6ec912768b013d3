// CPUID, XGETBV and HWCAP. Own code, since __builtin_cpu_supports needs a runtime object that not every toolchain
// links; and in a file without instruction set flags, since it must run before anything is known.
#include "paths.h"

#include "failure.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace halo {
namespace {

#if defined(__x86_64__)
struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf) {
  Registers r;
  __asm__ volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(0));
  return r;
}

bool bit(unsigned word, int index) { return word >> index & 1; }

// The register files that the kernel saves: 0x06 for AVX, 0xe6 for AVX-512. An instruction set without it faults.
bool kernel_saves(unsigned mask) {
  if (!bit(cpuid(1).c, 27)) return false;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

bool has_avx2() {  // and FMA and F16C
  if (cpuid(0).a < 7 || !kernel_saves(0x06)) return false;
  return bit(cpuid(1).c, 28) && bit(cpuid(1).c, 12) && bit(cpuid(1).c, 29) && bit(cpuid(7).b, 5);
}

bool has_avx512() {  // F, DQ, BW, VL and VNNI
  if (!has_avx2() || !kernel_saves(0xe6)) return false;
  Registers seven = cpuid(7);
  return bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
}

bool has_avx512vbmi() { return has_avx512() && bit(cpuid(7).c, 1); }
#endif

}  // namespace

std::vector<const Kernels *> usable_paths() {
  std::vector<const Kernels *> paths;
#if defined(__x86_64__)
  if (has_avx512vbmi()) paths.push_back(&avx512vbmi_table);
  if (has_avx512()) paths.push_back(&avx512_table);
  if (has_avx2()) paths.push_back(&avx2_table);
#elif defined(__aarch64__)
  const unsigned long asimddp = 1ul << 20;
  if (getauxval(AT_HWCAP) & asimddp) paths.push_back(&neondot_table);
  paths.push_back(&neon_table);
#endif
  paths.push_back(&scalar_table);
  return paths;
}

const Kernels &choose_path(const char *name) {
  std::string usable;
  for (const Kernels *path : usable_paths()) {
    if (!name || std::string(name) == path->name) return *path;
    usable += std::string(usable.empty() ? "" : ", ") + path->name;
  }
  throw Failure(HALO_UNSUPPORTED, "the CPU path '%s' cannot run here; this machine has %s", name, usable.c_str());
}

}  // namespace halo
