// The kernels of cpu/amx.h. Only what stands inside the target region may use it; see isa_avx512.cpp.
#include "cpu/amx.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#define FASTLSTM_ISA amx
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_AMX_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(FASTLSTM_AMX_TARGET))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#endif
#include "cpu/amx_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlstm::amx {
namespace {

bool detect() {
  // torch's variable names no level with AMX: whoever sets it asks for less.
  if (std::getenv("ATEN_CPU_CAPABILITY") || std::strcmp(isa_name(), "avx512") != 0) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
    return false;                                                               // bf16, tile
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;  // avx512_bf16
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;                     // the system saves tile configuration and data
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool available() {
  static const bool yes = detect();
  return yes;
}

}  // namespace fastlstm::amx

#else

namespace fastlstm::amx {
bool available() { return false; }
int64_t packed_gates_size(int64_t, int64_t) { return 0; }
void pack_gates(const Bf16*, int64_t, int64_t, int64_t, int64_t, Bf16*) {}
int64_t packed_columns_size(int64_t, int64_t) { return 0; }
void pack_columns(const Bf16*, int64_t, int64_t, int64_t, int64_t, Bf16*) {}
int64_t forward_scratch(int64_t) { return 0; }
void forward(const ForwardArgs&, const Member&) {}
void backward(const BackwardArgs&, const Member&) {}
}  // namespace fastlstm::amx
#endif
