// The kernels of cpu/int8.h in AMX tiles, with AVX512_VNNI for few rows.
#include "cpu/int8.h"

#if defined(FASTLSTM_VNNI_KERNELS)
#include "cpu/target.h"

#define FASTLSTM_ISA amx_int8
#define FASTLSTM_VNNI 1
#define FASTLSTM_INT8_AMX 1
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_INT8_NAME "amx_int8"
FASTLSTM_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,amx-tile,amx-int8")
#include "cpu/int8_kernels.h"
FASTLSTM_END_TARGET

namespace fastlstm::int8 {
const Kernels& amx_kernels() { return amx_int8::kInt8Table; }
}  // namespace fastlstm::int8
#endif
