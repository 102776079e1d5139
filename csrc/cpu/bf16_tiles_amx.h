// Products in AMX tiles, for the loops of cpu/bf16_kernels.h.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/bf16_numbers.h"

namespace fastlstm::FASTLSTM_ISA {

// Tiles 0 to 3, [2 row tiles][2], += a [32, 32 depth] times packed [depth][2] tiles.
// Two row tiles share every load of a weight. Prefetching weights from the L2 gained nothing.
// `between` is called once for each tile of depth: vector work there runs while the tile unit multiplies.
template <class F>
FASTLSTM_INLINE void multiply_two(int64_t depth, const Bf16* a, int64_t lda, const Bf16* w, F&& between) {
  const int64_t bytes = lda * sizeof(Bf16);
  for (int64_t k = 0; k < depth; ++k, a += kTileDepth, w += 2 * kTile) {
    _tile_loadd(4, a, bytes);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTileRows * lda, bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    between();
  }
}

// Tiles 0 to 3, [4], += a [16, 32 depth] times packed tiles and those `next` elements behind them: with two
// accumulators only, the tile unit would wait for each product before the next.
template <class F>
FASTLSTM_INLINE void multiply_one(int64_t depth, const Bf16* a, int64_t lda, const Bf16* w, int64_t next,
                                  F&& between) {
  for (int64_t k = 0; k < depth; ++k, a += kTileDepth, w += 2 * kTile) {
    _tile_loadd(4, a, lda * sizeof(Bf16));
    _tile_loadd(5, w, 64);
    _tile_loadd(6, w + kTile, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    between();
    _tile_loadd(5, w + next, 64);
    _tile_loadd(6, w + next + kTile, 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 6);
    between();
  }
}

// What multiply_two made to out [32, 32] with a row stride of 64.
FASTLSTM_INLINE void store_two(float* out) {
  _tile_stored(0, out, 64 * sizeof(float));
  _tile_stored(1, out + 16, 64 * sizeof(float));
  _tile_stored(2, out + kTileRows * 64, 64 * sizeof(float));
  _tile_stored(3, out + kTileRows * 64 + 16, 64 * sizeof(float));
}

// What multiply_one made to out [16, 64].
FASTLSTM_INLINE void store_one(float* out) {
  _tile_stored(0, out, 64 * sizeof(float));
  _tile_stored(1, out + 16, 64 * sizeof(float));
  _tile_stored(2, out + 32, 64 * sizeof(float));
  _tile_stored(3, out + 48, 64 * sizeof(float));
}

// pre [rows][4][16] of one block of units and one or two row tiles.
template <class T, class F>
FASTLSTM_INLINE void gate_products(const ForwardArgs<T>& a, int64_t rows, const Bf16* x, const Bf16* h,
                                   int64_t u0, float* pre, F&& between) {
  const int64_t ldx = row_stride(a.I), ldh = row_stride(a.P);
  const int64_t dx = padded(a.I) / kTileDepth, dh = padded(a.P) / kTileDepth;
  // From the weights of i, f to those of g, o.
  const int64_t next_ih = dx * 2 * kTile, next_hh = dh * 2 * kTile;
  const Bf16* w_ih = a.w_ih + u0 / kBlock * 2 * next_ih;
  const Bf16* w_hh = a.w_hh + u0 / kBlock * 2 * next_hh;
  if (rows <= kTileRows) {
    clear_tiles();
    multiply_one(dx, x, ldx, w_ih, next_ih, between);
    multiply_one(dh, h, ldh, w_hh, next_hh, between);
    return store_one(pre);
  }
  for (int64_t pair = 0; pair < 2; ++pair) {
    clear_tiles();
    multiply_two(dx, x, ldx, w_ih + pair * next_ih, between);
    multiply_two(dh, h, ldh, w_hh + pair * next_hh, between);
    store_two(pre + pair * 32);
  }
}

// Whether column_products takes 64 columns of `rows` rows at once, and not 32.
FASTLSTM_INLINE bool wide_columns(int64_t rows) { return rows <= kTileRows; }

// out [rows <= 32][64] = a [rows, K] times packed columns: 64 of them if `wide`, else 32. next: elements from
// the first 32 packed columns to the next.
template <class F>
FASTLSTM_INLINE void column_products(int64_t rows, int64_t K, const Bf16* a, int64_t lda, const Bf16* w,
                                     int64_t next, bool wide, float* out, F&& between) {
  const int64_t depth = padded(K) / kTileDepth;
  clear_tiles();
  if (rows > kTileRows) {
    multiply_two(depth, a, lda, w, between);
    store_two(out);
  } else {
    multiply_one(depth, a, lda, w, wide ? next : 0, between);
    store_one(out);
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
