// Chooses the kernels at run time: an installed wheel must run on a machine older than the one that built it.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "cpu/bf16.h"
#include "cpu/sequence.h"

namespace fastlstm {

#define FASTLSTM_EXTERN(...) extern template const Kernels<__VA_ARGS__>& table<__VA_ARGS__>();
#define FASTLSTM_DECLARE(isa, for_each) \
  namespace isa {                       \
  template <class T, class S>           \
  const Kernels<T, S>& table();         \
  for_each(FASTLSTM_EXTERN)             \
  }
FASTLSTM_DECLARE(baseline, FASTLSTM_FOR_EACH_KERNELS)
#if defined(__x86_64__)
FASTLSTM_DECLARE(avx2, FASTLSTM_FOR_EACH_KERNELS)
FASTLSTM_DECLARE(avx512, FASTLSTM_FOR_EACH_KERNELS)
#endif
#if defined(FASTLSTM_BF16_KERNELS)
FASTLSTM_DECLARE(avx512_rounding_bf16, FASTLSTM_FOR_EACH_BF16_KERNELS)
#endif
#undef FASTLSTM_DECLARE
#undef FASTLSTM_EXTERN

namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa choose() {
#if defined(__x86_64__)
  // torch's own variable, so that one setting lowers both.
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  if (wish && std::strcmp(wish, "default") == 0) return Isa::kBaseline;
  const bool no_avx512 = wish && std::strcmp(wish, "avx2") == 0;
  __builtin_cpu_init();
  if (!no_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

bool is_amd_with_avx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx2") && !__builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

const char* isa_name() {
  switch (chosen()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

const char* bfloat16_isa_name() { return bf16::kernels<Bf16>() ? bf16::kernels<Bf16>()->name : isa_name(); }

template <class T, class S>
const Kernels<T, S>& kernels() {
#if defined(FASTLSTM_BF16_KERNELS)
  if constexpr (std::is_same_v<T, Bf16>)
    if (bf16::has_instructions()) return avx512_rounding_bf16::table<T, S>();
#endif
#if defined(__x86_64__)
  if (chosen() == Isa::kAvx512) return avx512::table<T, S>();
  if (chosen() == Isa::kAvx2) return avx2::table<T, S>();
#endif
  return baseline::table<T, S>();
}
#define FASTLSTM_INSTANTIATE(...) template const Kernels<__VA_ARGS__>& kernels<__VA_ARGS__>();
FASTLSTM_FOR_EACH_KERNELS(FASTLSTM_INSTANTIATE)
#undef FASTLSTM_INSTANTIATE

}  // namespace fastlstm
