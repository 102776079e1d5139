// The kernels for x86-64 CPUs with AVX512.
#if defined(__x86_64__)
#include "cpu/sequence.h"
#include "cpu/target.h"

#define FASTLSTM_ISA avx512
#define FASTLSTM_VECTOR_BYTES 64
FASTLSTM_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma")
#include "cpu/kernel_table.h"
FASTLSTM_END_TARGET
#endif
