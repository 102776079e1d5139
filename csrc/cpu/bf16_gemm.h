// The products after backward's loop, dx and dW, on the products of cpu/bf16_tiles_*.h, of which the includer
// has chosen one. Blocks of A of kGemmRows x kGemmDepth stay in the L2 while the packed columns of B pass.
#pragma once

#include "cpu/bf16_numbers.h"

namespace fastlstm::FASTLSTM_ISA {

// to [columns, rows], of row stride ld, = from [rows, columns] transposed; zeros in columns [rows,
// padded(rows)).
inline void transpose_factors(const Bf16* from, int64_t ldf, int64_t rows, int64_t columns, Bf16* to,
                              int64_t ld) {
  for (int64_t j0 = 0; j0 < columns; j0 += 16) {
    const int64_t n = std::min<int64_t>(16, columns - j0);
    for (int64_t r0 = 0; r0 < rows; r0 += kTileDepth) {
      const auto row = [&](int64_t r) {
        return r < rows ? _mm512_cvtepu16_epi32(factors16(from + r * ldf + j0, n)) : __m512i{};
      };
      V pairs[16];  // of rows r0 + 2 p and the next, for 16 columns
      for (int64_t p = 0; p < 16; ++p)
        pairs[p] = (V)_mm512_or_si512(row(r0 + 2 * p), _mm512_slli_epi32(row(r0 + 2 * p + 1), 16));
      transpose<float>(pairs);
      for (int64_t j = 0; j < n; ++j) _mm512_storeu_si512(to + (j0 + j) * ld + r0, (__m512i)pairs[j]);
    }
  }
}

inline void gemm(const GemmArgs& g) {
  const ProductScope scope;
  const int64_t next = padded(g.k) * kUnits;  // from the packed columns of 32 to the next
  alignas(64) float sums[2 * kTileRows * 64];
  if (g.k == 0 && !g.add)
    for (int64_t r = 0; r < g.m; ++r) std::fill_n(g.c + r * g.ldc, g.n, 0.0f);
  for (int64_t r0 = 0; r0 < g.m; r0 += bf16::kGemmRows)
    for (int64_t k0 = 0; k0 < g.k; k0 += bf16::kGemmDepth) {
      const int64_t rows = std::min(bf16::kGemmRows, g.m - r0), depth = std::min(bf16::kGemmDepth, g.k - k0);
      const bool add = g.add || k0 > 0;
      const Bf16* a = g.a + r0 * g.lda + k0;
      int64_t lda = g.lda;
      if (g.transposed_a) {
        lda = row_stride(depth);
        transpose_factors(g.a + k0 * g.lda + r0, g.lda, depth, rows, g.scratch, lda);
        a = g.scratch;
      }
      for (int64_t n0 = 0; n0 < g.n; n0 += 2 * kUnits) {
        const bool wide = n0 + kUnits < g.n;
        const int64_t columns = std::min(2 * kUnits, g.n - n0);
        const Bf16* b = g.b + n0 / kUnits * next + k0 * kUnits;
        for (int64_t r = 0; r < rows; r += 2 * kTileRows) {
          const int64_t count = std::min(2 * kTileRows, rows - r);
          // Up to 16 rows AMX multiplies 64 columns at once, otherwise 32.
          const int64_t step = (wide_columns(count) ? 2 : 1) * kUnits;
          for (int64_t j0 = 0; j0 < columns; j0 += step) {
            column_products(count, depth, a + r * lda, lda, b + j0 / kUnits * next, next, wide, sums, [] {});
            const int64_t width = std::min(step, columns - j0);
            for (int64_t i = 0; i < count; ++i) {
              float* c = g.c + (r0 + r + i) * g.ldc + n0 + j0;
              for (int64_t j = 0; j < width; j += 16) {
                const int n = static_cast<int>(std::min<int64_t>(16, width - j));
                const V sum = load(sums + i * 64 + j);
                store_part(c + j, add ? load_part(c + j, n) + sum : sum, n);
              }
            }
          }
        }
      }
    }
}

}  // namespace fastlstm::FASTLSTM_ISA
