// The kernels of cpu/int8.h by AVX512_VNNI.
#include "cpu/int8.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include "cpu/target.h"

#define FASTLSTM_ISA avx512_vnni
#define FASTLSTM_VNNI 1
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_INT8_NAME "avx512_vnni"
FASTLSTM_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#include "cpu/int8_kernels.h"
FASTLSTM_END_TARGET

namespace fastlstm::int8 {
const Kernels& avx512_kernels() { return avx512_vnni::kInt8Table; }
}  // namespace fastlstm::int8
#endif
