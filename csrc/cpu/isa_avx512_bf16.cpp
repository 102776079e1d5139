// The kernels that widen bfloat16, for CPUs with AVX512_BF16: its instruction rounds 16 numbers in the place
// of eight.
#include "cpu/bf16.h"

#if defined(FASTLSTM_BF16_KERNELS)
#include "cpu/target.h"

#define FASTLSTM_ISA avx512_rounding_bf16
#define FASTLSTM_ROUNDS_BF16 1
#define FASTLSTM_TABLES FASTLSTM_FOR_EACH_BF16_KERNELS
#define FASTLSTM_VECTOR_BYTES 64
FASTLSTM_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "cpu/kernel_table.h"
FASTLSTM_END_TARGET
#endif
