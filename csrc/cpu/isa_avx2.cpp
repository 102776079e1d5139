// The kernels for x86-64 CPUs with AVX2. Only what stands inside the target region may use it: the standard
// headers come first, so that no inline function of theirs is compiled for avx2 and then linked into code for
// older CPUs.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "cpu/sequence.h"

#define FASTLSTM_ISA avx2
#define FASTLSTM_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cpu/kernel_table.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
