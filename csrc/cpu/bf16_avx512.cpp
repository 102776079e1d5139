// The kernels of cpu/bf16.h by AVX512_BF16.
#include "cpu/bf16.h"

#if defined(FASTLSTM_BF16_KERNELS)
#include "cpu/target.h"

#define FASTLSTM_ISA avx512_bf16
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_BF16_NAME "avx512_bf16"
FASTLSTM_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#include "cpu/bf16_tiles_avx512.h"
// after the products
#include "cpu/bf16_gemm.h"
#include "cpu/bf16_kernels.h"
FASTLSTM_END_TARGET

namespace fastlstm::bf16 {
template <class T>
const Kernels<T>& avx512_kernels() {
  return avx512_bf16::kTable<T>;
}
template const Kernels<float>& avx512_kernels<float>();
template const Kernels<Bf16>& avx512_kernels<Bf16>();
}  // namespace fastlstm::bf16
#endif
