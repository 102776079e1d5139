// Chooses the kernels of cpu/bf16.h at run time.
#include "cpu/bf16.h"

#include <cstdlib>
#include <cstring>

#include "cpu/amx.h"

#if defined(FASTLSTM_BF16_KERNELS)
#include <cpuid.h>
#endif

namespace fastlstm::bf16 {

template <class T>
const Kernels<T>& amx_kernels();
template <class T>
const Kernels<T>& avx512_kernels();

namespace {

enum class Isa { none, avx512_bf16, amx };

#if defined(FASTLSTM_BF16_KERNELS)
// Returns true if AVX512_BF16's instruction is no faster than two FMAs of widened operands: on Sapphire
// Rapids it takes 2 cycles for 32 products, an FMA half a cycle for 16. Zen 4 and 5 start one per cycle.
bool dot_products_are_slow() {
  unsigned a, b, c, d;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx;
}

bool look_for_instructions() {
  unsigned a, b, c, d;
  return std::strcmp(isa_name(), "avx512") == 0 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

Isa choose() {
  if (!has_instructions()) return Isa::none;
  if (std::getenv("ATEN_CPU_CAPABILITY")) return Isa::avx512_bf16;
  if (amx_granted(AmxProducts::bf16)) return Isa::amx;
  return dot_products_are_slow() ? Isa::none : Isa::avx512_bf16;
}
#else
bool look_for_instructions() { return false; }
#endif

}  // namespace

bool has_instructions() {
  static const bool found = look_for_instructions();
  return found;
}

template <class T>
const Kernels<T>* kernels() {
#if defined(FASTLSTM_BF16_KERNELS)
  static const Isa chosen = choose();
  if (chosen == Isa::amx) return &amx_kernels<T>();
  if (chosen == Isa::avx512_bf16) return &avx512_kernels<T>();
#endif
  return nullptr;
}

template const Kernels<float>* kernels<float>();
template const Kernels<Bf16>* kernels<Bf16>();

}  // namespace fastlstm::bf16
