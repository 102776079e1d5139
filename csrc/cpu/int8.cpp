// The kernels of cpu/int8.h for what every CPU of the target architecture has, and the choice at run time.
#include "cpu/int8.h"

#include "cpu/amx.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <limits>

#define FASTLSTM_ISA baseline_int8
#define FASTLSTM_VECTOR_BYTES 16
#define FASTLSTM_INT8_NAME "baseline"
#include "cpu/int8_kernels.h"

namespace fastlstm::int8 {

const Kernels& amx_kernels();
const Kernels& avx512_kernels();
const Kernels& avx_vnni_kernels();
const Kernels& avx2_kernels();

namespace {

#if defined(FASTLSTM_VNNI_KERNELS)
bool has_avx512_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && c >> 11 & 1;
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

const Kernels& choose() {
#if defined(FASTLSTM_VNNI_KERNELS)
  if (std::strcmp(isa_name(), "avx512") == 0 && has_avx512_vnni())
    return amx_granted(AmxProducts::int8) ? amx_kernels() : avx512_kernels();
  if (std::strcmp(isa_name(), "baseline") != 0 && has_avx_vnni()) return avx_vnni_kernels();
#endif
#if defined(__x86_64__)
  if (std::strcmp(isa_name(), "baseline") != 0) return avx2_kernels();
#endif
  return baseline_int8::kInt8Table;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastlstm::int8
