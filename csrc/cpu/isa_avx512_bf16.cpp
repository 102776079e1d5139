// The kernels that widen bfloat16, for CPUs with AVX512_BF16: its instruction rounds 16 numbers in the place
// of eight. Only what stands inside the target region may use it; see isa_avx512.cpp.
#include "cpu/bf16.h"

#if defined(FASTLSTM_BF16_KERNELS)
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#define FASTLSTM_ISA avx512_rounding_bf16
#define FASTLSTM_ROUNDS_BF16 1
#define FASTLSTM_TABLES FASTLSTM_FOR_EACH_BF16_KERNELS
#define FASTLSTM_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#endif
#include "cpu/kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
