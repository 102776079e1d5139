// The kernels of cpu/int8.h by AVX_VNNI, which CPUs without AVX-512 have.
#include "cpu/int8.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include "cpu/target.h"

#define FASTLSTM_ISA avx_vnni
#define FASTLSTM_VNNI 1
#define FASTLSTM_VECTOR_BYTES 32
#define FASTLSTM_INT8_NAME "avx_vnni"
FASTLSTM_BEGIN_TARGET("avx2,avxvnni,fma")
#include "cpu/int8_kernels.h"
FASTLSTM_END_TARGET

namespace fastlstm::int8 {
const Kernels& avx_vnni_kernels() { return avx_vnni::kInt8Table; }
}  // namespace fastlstm::int8
#endif
