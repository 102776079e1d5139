// Whether this process may use AMX tiles: for the choice of kernels at run time (cpu/bf16.cpp, cpu/int8.cpp).
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>

namespace fastlstm {

// Products of tiles, by their bit of CPUID leaf 7, edx.
enum class AmxProducts { bf16 = 22, int8 = 25 };

// Returns true if the CPU has the products and the system grants this process the tile registers, which it
// requests. False where ATEN_CPU_CAPABILITY is set: no level names AMX.
inline bool amx_granted(AmxProducts products) {
#if defined(__x86_64__) && defined(__linux__)
  if (std::getenv("ATEN_CPU_CAPABILITY")) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> static_cast<int>(products) & 1) || !(d >> 24 & 1)) return false;  // products, tiles
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;         // xgetbv
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;                     // the system saves tile configuration and data
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  static_cast<void>(products);
  return false;
#endif
}

}  // namespace fastlstm
