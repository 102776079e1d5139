// Products by AVX512_BF16's instruction, which multiplies 16 pairs and adds both products of each to a lane;
// for the loops of cpu/bf16_kernels.h.
#pragma once

#include "cpu/bf16_numbers.h"

namespace fastlstm::FASTLSTM_ISA {

// Nothing to set up, unlike AMX; a constructor, so that no compiler calls it unused.
struct ProductScope {
  ProductScope() {}
};

// Rows of a register tile of 32 columns, and of one of 64: with fewer columns each sum would wait for the one
// before.
constexpr int kLongRows = 12, kWideRows = 6;

// sums [M][NV] += a [M, 32 depth] times packed tiles, [depth][2] and, for NV = 4, those `next` elements on.
// For NV = 2 these are fetched into the L2 meanwhile: at H = 1024 the L3 would give them too late (5 %).
template <int M, int NV>
FASTLSTM_INLINE void accumulate(int64_t depth, const Bf16* a, int64_t lda, const Bf16* w, int64_t next,
                                __m512 (&sums)[M][NV]) {
  // A pointer to every third row, the two after it by lda and 2 lda: one a row would not fit the registers.
  const Bf16* base[(M + 2) / 3];
#pragma GCC unroll 4
  for (int g = 0; g < (M + 2) / 3; ++g) base[g] = a + 3 * g * lda;
  for (int64_t k = 0; k < depth; ++k, w += 2 * kTile) {
    const Bf16* pairs = w;
    for (int64_t p = 0; p < kTileDepth / 2; ++p, pairs += 32) {
      __m512bh columns[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n)
        columns[n] = (__m512bh)_mm512_loadu_si512(pairs + n % 2 * kTile + n / 2 * next);
      if constexpr (NV == 2) {
        __builtin_prefetch(pairs + next, 0, 2);
        __builtin_prefetch(pairs + next + kTile, 0, 2);
      }
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        std::memcpy(&pair, base[m / 3] + m % 3 * lda, sizeof(pair));
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], both, columns[n]);
      }
#pragma GCC unroll 4
      for (int g = 0; g < (M + 2) / 3; ++g) base[g] += 2;
    }
  }
}

// A left operand of some depth in tiles and its packed weights.
struct Operands {
  int64_t depth;
  const Bf16* a;
  int64_t lda;
  const Bf16* w;
  int64_t next;  // from the weights of 32 columns to those of the next 32
  Operands from(int64_t row, int64_t half) const {
    return {depth, a + row * lda, lda, w + half * next, next};
  }
};

// out [M][16 NV] with row stride 64 = the sum of two products. A function of its own for every shape: inlined
// beside the others it would have its pointers spilled.
template <int M, int NV>
__attribute__((noinline)) void tile(const Operands& first, const Operands& second, float* out) {
  __m512 sums[M][NV] = {};
  accumulate<M, NV>(first.depth, first.a, first.lda, first.w, first.next, sums);
  accumulate<M, NV>(second.depth, second.a, second.lda, second.w, second.next, sums);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) _mm512_storeu_ps(out + m * 64 + n * 16, sums[m][n]);
}

template <int NV, int M>
FASTLSTM_INLINE void tile_rows(int64_t rows, const Operands& first, const Operands& second, float* out) {
  if constexpr (M > 0) {
    if (rows == M) return tile<M, NV>(first, second, out);
    tile_rows<NV, M - 1>(rows, first, second, out);
  }
}

// out [rows][64] = the sum of two products, of 64 columns if `wide`, else of 32.
inline void sum_of_products(int64_t rows, const Operands& first, const Operands& second, bool wide,
                            float* out) {
  if (wide && rows <= kWideRows) return tile_rows<4, kWideRows>(rows, first, second, out);
  for (int64_t half = 0; half < (wide ? 2 : 1); ++half)
    for (int64_t r = 0, count; r < rows; r += count) {
      // Near-equal tiles: 8 + 8 rows, not 12 + 4.
      const int64_t left = (rows - r + kLongRows - 1) / kLongRows;
      count = (rows - r + left - 1) / left;
      tile_rows<2, kLongRows>(count, first.from(r, half), second.from(r, half), out + r * 64 + half * 32);
    }
}

// pre [rows <= 32][4][16] of one block of units. The cells that wait, `between`, could not run beside these
// products.
template <class T, class F>
FASTLSTM_INLINE void gate_products(const ForwardArgs<T>& a, int64_t rows, const Bf16* x, const Bf16* h,
                                   int64_t u0, float* pre, F&&) {
  const int64_t dx = padded(a.I) / kTileDepth, dh = padded(a.P) / kTileDepth;
  const int64_t next_ih = dx * 2 * kTile, next_hh = dh * 2 * kTile;
  sum_of_products(rows, {dx, x, row_stride(a.I), a.w_ih + u0 / kBlock * 2 * next_ih, next_ih},
                  {dh, h, row_stride(a.P), a.w_hh + u0 / kBlock * 2 * next_hh, next_hh}, true, pre);
}

// Whether column_products takes 64 columns of `rows` rows at once, and not 32.
FASTLSTM_INLINE bool wide_columns(int64_t) { return true; }

// out [rows <= 32][64] = a [rows, K] times packed columns: 64 of them if `wide`, else 32. next: elements from
// the first 32 packed columns to the next.
template <class F>
FASTLSTM_INLINE void column_products(int64_t rows, int64_t K, const Bf16* a, int64_t lda, const Bf16* w,
                                     int64_t next, bool wide, float* out, F&&) {
  sum_of_products(rows, {padded(K) / kTileDepth, a, lda, w, next}, {0, a, lda, w, 0}, wide, out);
}

}  // namespace fastlstm::FASTLSTM_ISA
