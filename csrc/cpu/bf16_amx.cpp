// The kernels of cpu/bf16.h in AMX tiles. Only what stands inside the target region may use it; see
// isa_avx512.cpp.
#include "cpu/bf16.h"

#if defined(FASTLSTM_BF16_KERNELS)
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#define FASTLSTM_ISA amx
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_BF16_NAME "amx"
#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#endif
#include "cpu/bf16_tiles_amx.h"
// after the products
#include "cpu/bf16_gemm.h"
#include "cpu/bf16_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlstm::bf16 {
template <class T>
const Kernels<T>& amx_kernels() {
  return amx::kTable<T>;
}
template const Kernels<float>& amx_kernels<float>();
template const Kernels<Bf16>& amx_kernels<Bf16>();
}  // namespace fastlstm::bf16
#endif
