// The kernels for x86-64 CPUs with AVX2.
#if defined(__x86_64__)
#include "cpu/sequence.h"
#include "cpu/target.h"

#define FASTLSTM_ISA avx2
#define FASTLSTM_VECTOR_BYTES 32
FASTLSTM_BEGIN_TARGET("avx2,fma")
#include "cpu/kernel_table.h"
FASTLSTM_END_TARGET
#endif
