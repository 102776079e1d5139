// Register tiles of C (+)= A B on one core, for the products inside the time loop, and the packing of B.
//
// A panel is kPanel = 2 vectors of columns of B, stored [K][kPanel]: one panel then streams from the cache at
// two vector loads for every 2*M multiply-adds of a tile of M rows.
#pragma once

#include <algorithm>

#include "cpu/sequence.h"
#include "cpu/vec.h"

namespace fastlstm::FASTLSTM_ISA {

// Rows of a tile: rows x 2 accumulators, 2 columns of B and one broadcast fill the registers (16, or 32 with
// AVX-512 and on aarch64).
// Up to kWideRows rows take two panels at once, 4 columns of B: else each multiply-add waits for the one
// before.
#if FASTLSTM_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kTileRows = 12, kWideRows = 6;
#else
constexpr int kTileRows = 6, kWideRows = 2;
#endif
template <class T>
constexpr int kPanel = 2 * kWidth<T>;

// What a tile fetches into the L2 while it computes: `step` elements further at every k. The first tile of a
// panel reads it at 32 GB/s a core, which an L3 does not give on demand, and hardware prefetching stops at
// every page.
template <class T>
struct Ahead {
  const T* from;
  int64_t step;
};

// Depth of a product's pass: the panel of that depth and a tile's rows of A stay in a 32 KiB L1. Each pass is
// summed apart, so that rounding errors grow with its depth and not with all of K.
constexpr int64_t kDepth = 16384 / (2 * FASTLSTM_VECTOR_BYTES);

// c[m][n] (+)= sum over k of a[m][k] b[k][n], for M rows and NV vectors of columns, row strides lda, ldb,
// ldc. With transposed_a, a is given as a[k][m]. Columns of b come two vectors a panel, panels `next_panel`
// elements apart.
// A function of its own for every shape: inlined beside the others it would have its pointers spilled.
template <class T, int M, int NV, bool transposed_a = false, bool fetch = false>
__attribute__((noinline)) void tile(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                                    int64_t ldc, bool add, int64_t next_panel = kPanel<T>,
                                    Ahead<T> ahead = {nullptr, 0}) {
  constexpr int W = kWidth<T>;
  // A pointer to every third row, the two after it by lda and 2 lda: one a row would not fit the registers.
  constexpr int kBases = transposed_a ? 1 : (M + 2) / 3;
  int64_t k = 0;
  do {
    const int64_t end = std::min(K, k + kDepth);
    const T* base[kBases];
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] = a + (transposed_a ? k * lda : 3 * g * lda + k);
    const T* from = ahead.from + k * ahead.step;
    const T* bk = b + k * ldb;
    Vec<T> acc[M][NV] = {};
    for (; k < end; ++k, bk += ldb) {
      Vec<T> columns[NV];
      if constexpr (fetch) {
        __builtin_prefetch(from, 0, 2);
        if constexpr (kPanel<T> * sizeof(T) > 64) __builtin_prefetch(from + ahead.step / 2, 0, 2);
        from += ahead.step;
      }
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) columns[n] = load(bk + n / 2 * next_panel + n % 2 * W);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const T am = transposed_a ? base[0][m] : base[m / 3][m % 3 * lda];
#pragma GCC unroll 8
        for (int n = 0; n < NV; ++n) acc[m][n] += am * columns[n];
      }
#pragma GCC unroll 8
      for (int g = 0; g < kBases; ++g) base[g] += transposed_a ? lda : 1;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        T* out = c + m * ldc + n * W;
        store(out, add ? load(out) + acc[m][n] : acc[m][n]);
      }
    add = true;
  } while (k < K);
}

// The same for any number of rows up to kTileRows.
template <class T, int NV, bool transposed_a = false, int M = kTileRows>
FASTLSTM_INLINE void tile_rows(int rows, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
                               int64_t ldc, bool add, int64_t next_panel = kPanel<T>) {
  if constexpr (M > 0) {
    if (rows == M) return tile<T, M, NV, transposed_a>(K, a, lda, b, ldb, c, ldc, add, next_panel);
    tile_rows<T, NV, transposed_a, M - 1>(rows, K, a, lda, b, ldb, c, ldc, add, next_panel);
  }
}

// c [rows, 2 * kPanel] (+)= a [rows, K] times two neighbouring packed panels, for up to kWideRows rows.
template <class T>
FASTLSTM_INLINE void wide_product(int64_t rows, int64_t K, const T* a, int64_t lda, const T* panels, T* c,
                                  int64_t ldc, bool add) {
  constexpr int64_t W2 = kPanel<T>;
  tile_rows<T, 4, false, kWideRows>(static_cast<int>(rows), K, a, lda, panels, W2, c, ldc, add, K * W2);
}

// The same on a packed panel, fetching what comes after it.
template <class T, int M = kTileRows>
FASTLSTM_INLINE void panel_rows(int rows, int64_t K, const T* a, int64_t lda, const T* panel, T* c,
                                int64_t ldc, bool add, Ahead<T> ahead) {
  if constexpr (M > 0) {
    if (rows == M)
      return tile<T, M, 2, false, true>(K, a, lda, panel, kPanel<T>, c, ldc, add, kPanel<T>, ahead);
    panel_rows<T, M - 1>(rows, K, a, lda, panel, c, ldc, add, ahead);
  }
}

// Calls f(first row, rows) over `rows` in near-equal tiles of at most `most`: 4+4 rather than 6+2, since a
// tile of few rows waits for the latency of its few accumulators.
template <class F>
FASTLSTM_INLINE void for_row_tiles(int64_t rows, int64_t most, F&& f) {
  const int64_t tiles = (rows + most - 1) / most;
  if (tiles == 0) return;
  const int64_t least = rows / tiles, larger = rows % tiles;
  int64_t begin = 0;
  for (int64_t k = 0; k < tiles; ++k) {
    const int64_t size = least + (k < larger);
    f(begin, static_cast<int>(size));
    begin += size;
  }
}

// c [rows, kPanel] (+)= a [rows, K] times one packed panel, after which `next` is read: by default what lies
// behind it.
template <class T>
FASTLSTM_INLINE void panel_product(int64_t rows, int64_t K, const T* a, int64_t lda, const T* panel, T* c,
                                   int64_t ldc, bool add = false, const T* next = nullptr) {
  constexpr int64_t W2 = kPanel<T>;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t step = (W2 + tiles - 1) / tiles;
  int64_t k = 0;
  do {  // once even for K = 0, whose product is zero
    const int64_t pass = std::min(kDepth, K - k);
    const T* b = panel + k * W2;
    Ahead<T> ahead = {next && k + pass == K ? next : b + pass * W2, step};
    for_row_tiles(rows, kTileRows, [&](int64_t m, int M) {
      panel_rows<T>(M, pass, a + m * lda + k, lda, b, c + m * ldc, ldc, add || k > 0, ahead);
      ahead.from += pass * step;
    });
    k += kDepth;
  } while (k < K);
}

// c [rows, W] (+)= a [rows, K] times the first half of a packed panel.
template <class T>
FASTLSTM_INLINE void half_panel_product(int64_t rows, int64_t K, const T* a, int64_t lda, const T* panel,
                                        T* c, int64_t ldc, bool add = false) {
  for_row_tiles(rows, kTileRows, [&](int64_t m, int M) {
    tile_rows<T, 1>(M, K, a + m * lda, lda, panel, kPanel<T>, c + m * ldc, ldc, add);
  });
}

// n <= kPanel elements `stride` apart into a row of a panel, zeros behind them.
template <class T>
FASTLSTM_INLINE void copy_panel_row(const T* from, int64_t stride, int64_t n, T* to) {
  constexpr int64_t W = kWidth<T>;
  if (stride == 1) {
    const int first = static_cast<int>(std::min(W, n));
    store(to, load_part(from, first));
    store(to + W, load_part(from + first, static_cast<int>(n) - first));
    return;
  }
  for (int64_t j = 0; j < kPanel<T>; ++j) to[j] = j < n ? from[j * stride] : T(0);
}

// c [rows, columns] (+)= a [rows, K] times a panel of that many columns; of less than a whole one by way of
// `partial` [kTileRows, kPanel].
template <class T, bool transposed_a>
FASTLSTM_INLINE void edge_tile(int rows, int64_t columns, int64_t K, const T* a, int64_t lda, const T* panel,
                               int64_t ldb, bool add, T* c, int64_t ldc, T* partial) {
  constexpr int64_t W = kWidth<T>, W2 = kPanel<T>;
  if (columns == W2) return tile_rows<T, 2, transposed_a>(rows, K, a, lda, panel, ldb, c, ldc, add);
  if (columns > W)
    tile_rows<T, 2, transposed_a>(rows, K, a, lda, panel, ldb, partial, W2, false);
  else
    tile_rows<T, 1, transposed_a>(rows, K, a, lda, panel, ldb, partial, W2, false);
  for (int q = 0; q < rows; ++q)
    for (int64_t i = 0; i < columns; i += W) {
      const int part = static_cast<int>(std::min(W, columns - i));
      T* out = c + q * ldc + i;
      const Vec<T> v = load(partial + q * W2 + i);
      store_part(out, add ? load_part(out, part) + v : v, part);
    }
}

template <class T, bool transposed_a>
FASTLSTM_INLINE void small_product_of(const Product<T>& p) {
  constexpr int64_t W2 = kPanel<T>;
  T* panel = p.scratch;               // [k, W2]
  T* partial = p.scratch + p.k * W2;  // [kTileRows, W2]
  for (int64_t j = 0; j < p.n; j += W2) {
    const int64_t columns = std::min(W2, p.n - j);
    const T* b = p.b + j;
    int64_t ldb = p.ldb;
    if (columns < W2) {
      for (int64_t k = 0; k < p.k; ++k) copy_panel_row(b + k * ldb, 1, columns, panel + k * W2);
      b = panel;
      ldb = W2;
    }
    for_row_tiles(p.m, kTileRows, [&](int64_t r, int rows) {
      const T* a = p.a + (transposed_a ? r : r * p.lda);
      edge_tile<T, transposed_a>(rows, columns, p.k, a, p.lda, b, ldb, p.add, p.c + r * p.ldc + j, p.ldc,
                                 partial);
    });
  }
}

template <class T>
void small_product(const Product<T>& p) {
  p.transposed_a ? small_product_of<T, true>(p) : small_product_of<T, false>(p);
}

// Elements of scratch that takes.
template <class T>
int64_t small_product_scratch(int64_t K) {
  return (K + kTileRows) * kPanel<T>;
}

}  // namespace fastlstm::FASTLSTM_ISA
