// Products with a matrix B [K, N] packed in panels of columns, or as stored: W_hh and W_hr in backward, all
// weights of forward with layer normalization.
#pragma once

#include "cpu/gemm.h"

namespace fastlstm::FASTLSTM_ISA {

template <class T>
int64_t padded_columns(int64_t N) {
  return (N + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

template <class T>
int64_t columns_packed_size(int64_t K, int64_t N) {
  return padded_columns<T>(N) * K;
}

template <class T, class S>
void pack_columns(const T* b, int64_t K, int64_t row_stride, int64_t column_stride, int64_t begin,
                  int64_t end, S* packed) {
  constexpr int64_t W2 = kPanel<T>;
  for (int64_t n0 = begin; n0 < end; n0 += W2) {
    const int64_t n = std::min(W2, end - n0);
    S* panel = packed + n0 * K;
    for (int64_t k = 0; k < K; ++k)
      copy_panel_row(b + k * row_stride + n0 * column_stride, column_stride, n, panel + k * W2);
  }
}

// c[rows, columns n_begin..n_end) = a[rows, K] times packed panels, from the last to the first if
// `reverse_blocks`; c has room for whole panels.
template <class T, class S>
void product_packed(int64_t rows, int64_t K, const T* a, int64_t lda, const S* packed, int64_t n_begin,
                    int64_t n_end, T* c, int64_t ldc, bool reverse_blocks = false) {
  constexpr int64_t W2 = kPanel<T>;
  const int64_t step = rows <= kWideRows ? 2 * W2 : W2, parts = (n_end - n_begin + step - 1) / step;
  for (int64_t k = 0; k < parts; ++k) {
    int64_t n = n_begin + (reverse_blocks ? parts - 1 - k : k) * step;
    const int64_t end = std::min(n_end, n + step);
    if (end - n == 2 * W2) {
      wide_product(rows, K, a, lda, packed + n * K, c + n, ldc, false);
      continue;
    }
    for (; n < end; n += W2) {
      if (end - n <= kWidth<T>)
        half_panel_product(rows, K, a, lda, packed + n * K, c + n, ldc);
      else
        panel_product(rows, K, a, lda, packed + n * K, c + n, ldc, false,
                      reverse_blocks && n > n_begin ? packed + (n - W2) * K : nullptr);
    }
  }
}

// The same from B [K, N] as stored, for so few rows and steps that packing would not pay.
template <class T, class S>
void product_direct(int64_t rows, int64_t K, const T* a, int64_t lda, const S* b, int64_t N, int64_t n_begin,
                    int64_t n_end, T* c, int64_t ldc) {
  constexpr int64_t W = kWidth<T>;
  int64_t n = n_begin;
  for (int64_t k = 0; k < K; k += kDepth) {  // for the TLB, as in small_product_of
    const int64_t depth = std::min(kDepth, K - k);
    const S* rows_of_b = b + k * N;
    n = n_begin;
    for (; rows == 1 && n + 8 * W <= n_end; n += 8 * W)
      tile<T, 1, 8>(depth, a + k, lda, rows_of_b + n, N, c + n, ldc, k > 0);
    for (; n + 4 * W <= n_end; n += 4 * W)
      for_row_tiles(rows, kWideRows, [&](int64_t r, int M) {
        tile_rows<T, 4, false, kWideRows>(M, depth, a + r * lda + k, lda, rows_of_b + n, N, c + r * ldc + n,
                                          ldc, k > 0);
      });
  }
  for (; n < n_end; n += W) {
    const int part = static_cast<int>(std::min<int64_t>(W, n_end - n));
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> acc[4] = {};                      // four sums, since each addition waits for the one before
      for (int64_t k = 0; k + 4 <= K; k += 4)  // K = 4H
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) acc[q] += a[r * lda + k + q] * load_part(b + (k + q) * N + n, part);
      store_part(c + r * ldc + n, (acc[0] + acc[1]) + (acc[2] + acc[3]), part);
    }
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
