// The kernels of cpu/bf16.h in AMX tiles.
#include "cpu/bf16.h"

#if defined(FASTLSTM_BF16_KERNELS)
#include "cpu/target.h"

#define FASTLSTM_ISA amx
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_BF16_NAME "amx"
FASTLSTM_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#include "cpu/bf16_tiles_amx.h"
// after the products
#include "cpu/bf16_gemm.h"
#include "cpu/bf16_kernels.h"
FASTLSTM_END_TARGET

namespace fastlstm::bf16 {
template <class T>
const Kernels<T>& amx_kernels() {
  return amx::kTable<T>;
}
template const Kernels<float>& amx_kernels<float>();
template const Kernels<Bf16>& amx_kernels<Bf16>();
}  // namespace fastlstm::bf16
#endif
