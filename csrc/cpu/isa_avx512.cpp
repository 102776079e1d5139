// The kernels for x86-64 CPUs with AVX512. Only what stands inside the target region may use it: the standard
// headers come first, so that no inline function of theirs is compiled for avx512 and then linked into code
// for older CPUs.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "cpu/sequence.h"

#define FASTLSTM_ISA avx512
#define FASTLSTM_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#include "cpu/kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
