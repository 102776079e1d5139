// The AMX kernels of csrc/cpu/bf16.h with tiles that are emulated, in place of csrc/cpu/bf16_amx.cpp, so that
// they run on a CPU that has AVX512_BF16 alone.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/bf16.h"
#include "emulated_tiles.h"

#define FASTLSTM_ISA amx_emulated
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_BF16_NAME "amx_emulated"
#include "cpu/bf16_tiles_amx.h"
// after the products
#include "cpu/bf16_gemm.h"
#include "cpu/bf16_kernels.h"

namespace fastlstm::bf16 {
template <class T>
const Kernels<T>& amx_kernels() {
  return amx_emulated::kTable<T>;
}
template const Kernels<float>& amx_kernels<float>();
template const Kernels<Bf16>& amx_kernels<Bf16>();
}  // namespace fastlstm::bf16
