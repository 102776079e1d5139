// The kernels of cpu/int8.h by AVX_VNNI, which CPUs without AVX-512 have. Only what stands inside the target
// region may use it; see isa_avx512.cpp.
#include "cpu/int8.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#define FASTLSTM_ISA avx_vnni
#define FASTLSTM_VNNI 1
#define FASTLSTM_VECTOR_BYTES 32
#define FASTLSTM_INT8_NAME "avx_vnni"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avxvnni,fma")
#endif
#include "cpu/int8_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlstm::int8 {
const Kernels& avx_vnni_kernels() { return avx_vnni::kInt8Table; }
}  // namespace fastlstm::int8
#endif
