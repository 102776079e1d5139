// The kernels of cpu/int8.h by AVX2. Only what stands inside the target region may use it; see
// isa_avx512.cpp.
#if defined(__x86_64__)
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/int8.h"

#define FASTLSTM_ISA avx2_int8
#define FASTLSTM_VECTOR_BYTES 32
#define FASTLSTM_INT8_NAME "avx2"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cpu/int8_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlstm::int8 {
const Kernels& avx2_kernels() { return avx2_int8::kInt8Table; }
}  // namespace fastlstm::int8
#endif
