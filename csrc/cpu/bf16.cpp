// Chooses the kernels of cpu/bf16.h at run time.
#include "cpu/bf16.h"

#include <cstdlib>
#include <cstring>

#if defined(FASTLSTM_BF16_KERNELS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastlstm::bf16 {

const Kernels& amx_kernels();
const Kernels& avx512_kernels();

namespace {

#if defined(FASTLSTM_BF16_KERNELS)
// Whether the CPU has AMX for bfloat16 and the system gives this process its registers.
bool amx_granted() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))  // bf16, tile
    return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;                     // the system saves tile configuration and data
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Whether AVX512_BF16's instruction multiplies no faster than two FMAs, which take a widened operand each: on
// a Sapphire Rapids it takes 2 cycles for 32 products, where an FMA takes half of one for 16. Zen 4 and 5
// begin one in each cycle.
bool dot_products_are_slow() {
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
}

bool look_for_instructions() {
  unsigned a, b, c, d;
  return std::strcmp(isa_name(), "avx512") == 0 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

const Kernels* choose() {
  if (!has_instructions()) return nullptr;
  if (std::getenv("ATEN_CPU_CAPABILITY")) return &avx512_kernels();
  if (amx_granted()) return &amx_kernels();
  return dot_products_are_slow() ? nullptr : &avx512_kernels();
}
#else
bool look_for_instructions() { return false; }
const Kernels* choose() { return nullptr; }
#endif

}  // namespace

bool has_instructions() {
  static const bool found = look_for_instructions();
  return found;
}

const Kernels* kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace fastlstm::bf16
