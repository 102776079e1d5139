// Products of int8 in AMX tiles, for the time loop of cpu/int8_kernels.h. Weights are packed and rows are
// quantized as for AVX512_VNNI, whose microkernel multiplies what is left of few rows.
//
//   A   [16 rows][64]         factors, uint8; rows are factor_stride(K) bytes apart
//   B   [16 groups][16][4]    weights, int8: 64 of depth of one vector of a block; groups are 256 bytes apart
//   C   [16 rows][16]         sums, int32
//
// All tiles have full size, so that they are configured once per call whatever the depths of the layer. A
// tile reads up to 15 rows past the last, whose sums are not used, and factors past K, whose weights are
// zero.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/int8_products.h"

namespace fastlstm::FASTLSTM_ISA {

constexpr int64_t kInt8ProductRows = 2 * kAmxTileRows;
constexpr int64_t kInt8SpareRows = kAmxTileRows - 1;
constexpr int64_t kGroupBytes = kInt8Block * kGroup;           // of a block, and from group to group
constexpr int64_t kTileGroups = kAmxRowBytes / kGroup;         // of depth
constexpr int64_t kTileStepBytes = kTileGroups * kGroupBytes;  // four tiles of a block
constexpr int64_t kVectorBytes = kLanes * kGroup;              // from tile to tile of a step
static_assert(kTileGroups == 16 && kVectorBytes == kAmxRowBytes && kGroupBytes == 256);

// A block of weights as tiles read it.
class TileBlock {
 public:
  TileBlock(int64_t K, const int8_t* packed) : packed_(packed) {
    const int64_t n = int8::groups(K, kGroup), rest = n % kTileGroups;
    steps_ = n / kTileGroups;
    has_tail_ = rest > 0;
    if (!has_tail_) return;
    std::memcpy(tail_, packed + steps_ * kTileStepBytes, rest * kGroupBytes);
    std::memset(tail_ + rest * kGroupBytes, 0, (kTileGroups - rest) * kGroupBytes);
  }

  // Calls step(k, tiles) for every 64 of depth, with the first factor and the four tiles.
  template <class F>
  FASTLSTM_INLINE void for_steps(F&& step) const {
    for (int64_t s = 0; s < steps_; ++s) step(s * kAmxRowBytes, packed_ + s * kTileStepBytes);
    if (has_tail_) step(steps_ * kAmxRowBytes, tail_);
  }

 private:
  const int8_t* packed_;
  int64_t steps_;  // whole ones
  bool has_tail_;
  alignas(64) int8_t tail_[kTileStepBytes];  // the groups behind them, then zeros
};

// sums [16][4][16] of one row tile: tiles 0 to 3, of the four vectors. Two tiles of columns would wait for
// each other's products.
FASTLSTM_INLINE void multiply_row_tile(const FactorRows& a, const TileBlock& block, int32_t* sums) {
  const int64_t stride = a.stride();
  clear_tiles();
  block.for_steps([&](int64_t k, const int8_t* w) __attribute__((always_inline)) {
    _tile_loadd(4, a.q + k, stride);
    _tile_loadd(5, w, kGroupBytes);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, w + kVectorBytes, kGroupBytes);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, w + 2 * kVectorBytes, kGroupBytes);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, w + 3 * kVectorBytes, kGroupBytes);
    _tile_dpbusd(3, 4, 5);
  });
  constexpr int64_t kStride = kInt8Block * sizeof(int32_t);
  _tile_stored(0, sums, kStride);
  _tile_stored(1, sums + kLanes, kStride);
  _tile_stored(2, sums + 2 * kLanes, kStride);
  _tile_stored(3, sums + 3 * kLanes, kStride);
}

// sums [32][4][16] of two row tiles, two vectors at a time: tiles 0 to 3 are [2 row tiles][2 vectors]. A step
// loads four tiles for four products; one row tile at a time would load five, and the weights twice.
FASTLSTM_INLINE void multiply_two_row_tiles(const FactorRows& a, const TileBlock& block, int32_t* sums) {
  const int64_t stride = a.stride(), second = kAmxTileRows * stride;
  for (int64_t pair = 0; pair < 2; ++pair) {
    clear_tiles();
    block.for_steps([&](int64_t k, const int8_t* w) __attribute__((always_inline)) {
      _tile_loadd(4, a.q + k, stride);
      _tile_loadd(6, w + 2 * pair * kVectorBytes, kGroupBytes);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, w + (2 * pair + 1) * kVectorBytes, kGroupBytes);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, a.q + second + k, stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    });
    constexpr int64_t kStride = kInt8Block * sizeof(int32_t);
    int32_t* to = sums + 2 * pair * kLanes;
    _tile_stored(0, to, kStride);
    _tile_stored(1, to + kLanes, kStride);
    _tile_stored(2, to + kAmxTileRows * kInt8Block, kStride);
    _tile_stored(3, to + kAmxTileRows * kInt8Block + kLanes, kStride);
  }
}

// out [rows][4][kLanes] (+)= the products of kInt8AmxMinRows to kInt8ProductRows rows with a block.
__attribute__((noinline)) inline void amx_products(int64_t rows, const FactorRows& a, const Weight& w,
                                                   const TileBlock& block, float* out, bool add) {
  alignas(64) int32_t sums[kInt8ProductRows * kInt8Block];
  if (rows > kAmxTileRows)
    multiply_two_row_tiles(a, block, sums);
  else
    multiply_row_tile(a, block, sums);
  for (int64_t m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t at = m * kInt8Block + v * kLanes;
      const Ints sum = without_zero(load_ints(sums + at), a.of_row[m], w.offset + v * kLanes);
      put_scaled(sum, a.of_row[m], w.scale + v * kLanes, out + at, add);
    }
}

// Of `left` rows, how many are multiplied at once: two row tiles or one, unless its last tile would have
// fewer than kInt8AmxMinRows rows; then those are left to AVX512_VNNI.
FASTLSTM_INLINE int64_t product_rows(int64_t left) {
  if (left >= kAmxTileRows + kInt8AmxMinRows) return std::min(left, kInt8ProductRows);
  return left >= kInt8AmxMinRows ? std::min(left, kAmxTileRows) : left;
}
// Calls f(first, n) for parts of at most kInt8ProductRows rows, which block_products multiplies at once.
template <class F>
FASTLSTM_INLINE void for_product_rows(int64_t rows, F&& f) {
  for (int64_t r = 0, n; r < rows; r += n) f(r, n = product_rows(rows - r));
}

// out [rows][4][kLanes] (+)= the products of rows with a block.
FASTLSTM_INLINE void block_products(int64_t rows, const FactorRows& a, const Weight& w, float* out,
                                    bool add) {
  if (rows < kInt8AmxMinRows) return vector_products(rows, a, w, out, add);
  const TileBlock block(a.K, w.packed);
  for_product_rows(rows, [&](int64_t first, int64_t n) {
    if (n < kInt8AmxMinRows)
      vector_products(n, a.from(first), w, out + first * kInt8Block, add);
    else
      amx_products(n, a.from(first), w, block, out + first * kInt8Block, add);
  });
}

// The sums of one row with the four vectors of a block; 15 more rows can be read.
FASTLSTM_INLINE void row_sums(const FactorRows& a, const Weight& w, Ints (&row)[4]) {
  alignas(64) int32_t sums[kAmxTileRows * kInt8Block];
  multiply_row_tile(a, TileBlock(a.K, w.packed), sums);
  for (int v = 0; v < 4; ++v)
    row[v] = without_zero(load_ints(sums + v * kLanes), a.of_row[0], w.offset + v * kLanes);
}

}  // namespace fastlstm::FASTLSTM_ISA
