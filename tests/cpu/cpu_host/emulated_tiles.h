// AMX tiles in memory, in place of the intrinsics, so that kernels written for them run on a CPU without AMX.
// What a CPU refuses ends the program: tiles that are not configured, shapes that do not fit together.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

constexpr int kRows = 16, kRowBytes = 64, kTiles = 8;
struct Tile {
  alignas(64) unsigned char row[kRows][kRowBytes];
  int rows, bytes;
};
inline thread_local bool configured = false;
inline thread_local Tile tiles[kTiles];

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::printf("tiles: %s\n", what);
  std::fflush(stdout);
  std::abort();
}
// The 64 bytes that LDTILECFG reads: palette at 0, bytes of a row at 16, rows at 48.
inline void configure(const void* from) {
  const auto* bytes = static_cast<const unsigned char*>(from);
  require(bytes[0] == 1, "the palette must be 1");
  for (int k = 0; k < kTiles; ++k) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * k, sizeof(row_bytes));
    require(row_bytes <= kRowBytes && bytes[48 + k] <= kRows, "a tile has at most 16 rows of 64 bytes");
    tiles[k] = {{}, bytes[48 + k], row_bytes};
  }
  configured = true;
}
inline void release() { configured = false; }
inline Tile& tile(int k) {
  require(configured, "not configured");
  return tiles[k];
}
inline void clear(int k) { std::memset(tile(k).row, 0, sizeof(Tile::row)); }
inline void load(int k, const void* from, int64_t stride) {
  clear(k);
  for (int r = 0; r < tile(k).rows; ++r)
    std::memcpy(tiles[k].row[r], static_cast<const char*>(from) + r * stride, tiles[k].bytes);
}
inline void store(int k, void* to, int64_t stride) {
  for (int r = 0; r < tile(k).rows; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[k].row[r], tiles[k].bytes);
}

// Adds to each sum [16][16] of a tile what add(sum, a, b) makes of the 4 bytes a and b of each of its terms.
template <class Sum, class F>
void multiply(int sums, int a, int b, F&& add) {
  require(sums != a && sums != b && a != b, "three different tiles are multiplied");
  const Tile &left = tile(a), &right = tile(b);
  Tile& to = tile(sums);
  require(to.rows == left.rows && to.bytes == right.bytes && left.bytes == 4 * right.rows,
          "sums [M, N], factors [M, 4 K] and [K, N] must fit together");
  for (int m = 0; m < to.rows; ++m)
    for (int n = 0; n < to.bytes / 4; ++n) {
      Sum sum;
      std::memcpy(&sum, to.row[m] + 4 * n, sizeof(sum));
      for (int k = 0; k < right.rows; ++k) add(sum, left.row[m] + 4 * k, right.row[k] + 4 * n);
      std::memcpy(to.row[m] + 4 * n, &sum, sizeof(sum));
    }
}
// Two products of bfloat16, one after the other.
inline void multiply_bf16(int sums, int a, int b) {
  const auto number = [](const unsigned char* from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  };
  multiply<float>(sums, a, b, [&](float& sum, const unsigned char* x, const unsigned char* w) {
    for (int half = 0; half < 2; ++half) sum += number(x + 2 * half) * number(w + 2 * half);
  });
}
// Four products of uint8 and int8.
inline void multiply_int8(int sums, int a, int b) {
  multiply<int32_t>(sums, a, b, [](int32_t& sum, const unsigned char* x, const unsigned char* w) {
    for (int k = 0; k < 4; ++k) sum += int32_t{x[k]} * static_cast<int8_t>(w[k]);
  });
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::clear(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated::multiply_bf16(sums, a, b)
#define _tile_dpbusd(sums, a, b) emulated::multiply_int8(sums, a, b)
