// The AMX kernels of csrc/cpu/int8.h with tiles that are emulated, in place of csrc/cpu/int8_amx.cpp, so that
// they run on a CPU that has AVX512_VNNI alone.
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/int8.h"
#include "emulated_tiles.h"

#define FASTLSTM_ISA amx_int8_emulated
#define FASTLSTM_VNNI 1
#define FASTLSTM_INT8_AMX 1
#define FASTLSTM_VECTOR_BYTES 64
#define FASTLSTM_INT8_NAME "amx_int8_emulated"
#include "cpu/int8_kernels.h"

namespace fastlstm::int8 {
const Kernels& amx_kernels() { return amx_int8_emulated::kInt8Table; }
bool tiles_are_configured() { return emulated::configured; }
}  // namespace fastlstm::int8
