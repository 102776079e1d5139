// The AMX kernels of csrc/cpu/bf16.h with tiles that are emulated, in place of csrc/cpu/bf16_amx.cpp, so that
// they run on a CPU that has AVX512_BF16 alone.
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/bf16.h"

namespace emulated {

constexpr int kRows = 16, kRowBytes = 64;
struct Tile {
  alignas(64) unsigned char row[kRows][kRowBytes];
};
thread_local Tile tiles[8];

inline void load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < kRows; ++r)
    std::memcpy(tiles[tile].row[r], static_cast<const char*>(from) + r * stride, kRowBytes);
}
inline void store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < kRows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[tile].row[r], kRowBytes);
}
// sums [16][16] += a [16][16 pairs] b [16 pairs][16][2], a pair after the other.
inline void multiply(int sums, int a, int b) {
  const auto number = [](const unsigned char* from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  };
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kRows; ++n) {
      float sum;
      std::memcpy(&sum, tiles[sums].row[m] + 4 * n, sizeof(sum));
      for (int k = 0; k < kRows; ++k)
        for (int half = 0; half < 2; ++half)
          sum += number(tiles[a].row[m] + 4 * k + 2 * half) * number(tiles[b].row[k] + 4 * n + 2 * half);
      std::memcpy(tiles[sums].row[m] + 4 * n, &sum, sizeof(sum));
    }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) emulated::tiles[tile] = {}
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply(sums, a, b)

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
