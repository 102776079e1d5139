// The kernels of cpu/int8.h by AVX2.
#if defined(__x86_64__)
#include "cpu/int8.h"
#include "cpu/target.h"

#define FASTLSTM_ISA avx2_int8
#define FASTLSTM_VECTOR_BYTES 32
#define FASTLSTM_INT8_NAME "avx2"
FASTLSTM_BEGIN_TARGET("avx2,fma")
#include "cpu/int8_kernels.h"
FASTLSTM_END_TARGET

namespace fastlstm::int8 {
const Kernels& avx2_kernels() { return avx2_int8::kInt8Table; }
}  // namespace fastlstm::int8
#endif
