// The kernels of cpu/int8.h by AVX512_VNNI. Only what stands inside the target region may use it; see
// isa_avx512.cpp.
#include "cpu/int8.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#define FASTLSTM_ISA avx512_vnni
#define FASTLSTM_VNNI 1
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_INT8_NAME "avx512_vnni"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif
#include "cpu/int8_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlstm::int8 {
const Kernels& avx512_kernels() { return avx512_vnni::kInt8Table; }
}  // namespace fastlstm::int8
#endif
