// The kernels of cpu/int8.h in AMX tiles, with AVX512_VNNI for few rows. Only what stands inside the target
// region may use it; see isa_avx512.cpp.
#include "cpu/int8.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#define FASTLSTM_ISA amx_int8
#define FASTLSTM_VNNI 1
#define FASTLSTM_INT8_AMX 1
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_INT8_NAME "amx_int8"
#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,amx-tile,amx-int8"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,amx-tile,amx-int8")
#endif
#include "cpu/int8_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace fastlstm::int8 {
const Kernels& amx_kernels() { return amx_int8::kInt8Table; }
}  // namespace fastlstm::int8
#endif
