// Register tiles of C (+)= A B on one core, for the products inside the time loop, and the packing of B. A
// and C are float or double; B is that, or bfloat16 as stored (Bf16) or in panels (PanelBf16), which is
// widened as it is read.
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
//
// The loop over k is unrolled by kUnroll. Without that, a tile of 6 rows has 12 multiply-adds to 14 other
// instructions per k. On a core of its own these cost nothing; a second hardware thread of the core needs
// their slots. Measured with AVX2 (docs/cpu-kernels.md), on aarch64 not. With AVX-512 the tile has 24
// multiply-adds to 23 others; unrolling it was not measured.
#if FASTLSTM_VECTOR_BYTES == 64
constexpr int kTileRows = 12, kWideRows = 6, kUnroll = 1;
#elif defined(__aarch64__)
constexpr int kTileRows = 12, kWideRows = 6, kUnroll = 4;
#else
constexpr int kTileRows = 6, kWideRows = 2, kUnroll = 4;
#endif
template <class T>
constexpr int kPanel = 2 * kWidth<T>;

// While a tile computes with a panel, it prefetches what is read next into the L2, `lines` cache lines per
// kUnroll values of k: the first tile of a panel reads it at 32 GB/s a core, which an L3 does not give on
// demand, and hardware prefetching stops at every page. A panel's only tile prefetches all lines; of several
// tiles the first two prefetch one half each, or the first a single line. The last K % kUnroll values of k
// prefetch nothing.
template <class T, class S>
constexpr int kPanelLines = kUnroll * kPanel<T> * sizeof(S) / 64;
constexpr int kStrided = -1;  // in place of lines: rows of B are ldb apart, and nothing is prefetched

// The columns of a row of B, two vectors a panel.
template <class T, int NV, class S>
FASTLSTM_INLINE void load_columns(const S* b, int64_t next_panel, Vec<T> (&columns)[NV]) {
#pragma GCC unroll 8
  for (int n = 0; n < NV; ++n) {
    if constexpr (std::is_same_v<S, PanelBf16>) {
      const Bits<T> pairs = bit_cast<Bits<T>>(load(reinterpret_cast<const T*>(b + n / 2 * next_panel)));
      columns[n] = bit_cast<Vec<T>>(n % 2 ? pairs & 0xffff0000u : pairs << 16);
    } else {
      columns[n] = load(b + n / 2 * next_panel + n % 2 * kWidth<T>);
    }
  }
}
// sum + a b, of a tile of M rows. Inline assembly, because GCC otherwise copies or spills accumulators of the
// unrolled loop. A single row leaves b in memory.
template <class T, int M>
FASTLSTM_INLINE Vec<T> plus_product(Vec<T> sum, T a, Vec<T> b) {
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
  if constexpr (M == 1)
    return sum + a * b;
  else if constexpr (sizeof(T) == 4)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(_mm256_set1_ps(a)), "x"(b));
  else
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(_mm256_set1_pd(a)), "x"(b));
  return sum;
#else
  return sum + a * b;
#endif
}
// A row of a panel.
template <class S>
FASTLSTM_INLINE void store_panel_row(S* to, Vec<S> first, Vec<S> second) {
  store(to, first);
  store(to + kWidth<S>, second);
}
FASTLSTM_INLINE Vec<float> pairs_of(Vec<float> first, Vec<float> second) {  // of bfloat16 numbers
  return bit_cast<Vec<float>>(bit_cast<Bits<float>>(first) >> 16 | bit_cast<Bits<float>>(second));
}
FASTLSTM_INLINE void store_panel_row(PanelBf16* to, Vec<float> first, Vec<float> second) {
  store(reinterpret_cast<float*>(to), pairs_of(first, second));
}

// Depth of a product's pass: the panel of that depth and a tile's rows of A stay in a 32 KiB L1. Each pass is
// summed apart, so that rounding errors grow with its depth and not with all of K.
constexpr int64_t kDepth = 16384 / (2 * FASTLSTM_VECTOR_BYTES);

// c[m][n] (+)= sum over k of a[m][k] b[k][n], for M rows and NV vectors of columns, row strides lda, ldb,
// ldc. With transposed_a, a is given as a[k][m]. Columns of b come two vectors a panel, panels `next_panel`
// elements apart.
// Unless lines is kStrided, b is one packed panel, and cache lines from `ahead` on are prefetched.
// A function of its own for every shape: inlined beside the others it would have its pointers spilled.
template <class T, int M, int NV, bool transposed_a = false, int lines = kStrided, class S = T>
__attribute__((noinline)) void tile(int64_t K, const T* a, int64_t lda, const S* b, int64_t ldb, T* c,
                                    int64_t ldc, bool add, int64_t next_panel = kPanel<T>,
                                    const S* ahead = nullptr) {
  constexpr int W = kWidth<T>;
  constexpr int64_t kLine = 64 / sizeof(S);
  // A pointer to every third row, the two after it by lda and 2 lda: one a row would not fit the registers.
  constexpr int kBases = transposed_a ? 1 : (M + 2) / 3;
  const int64_t next_row = lines == kStrided ? ldb : kPanel<T>;  // a constant where it can be
  int64_t k = 0;
  do {
    const int64_t depth = std::min(K - k, kDepth);
    const T* base[kBases];
#pragma GCC unroll 8
    for (int g = 0; g < kBases; ++g) base[g] = a + (transposed_a ? k * lda : 3 * g * lda + k);
    const S* bk = b + k * ldb;
    Vec<T> acc[M][NV] = {};
    const auto add_steps = [&](auto steps) __attribute__((always_inline)) {
      constexpr int kSteps = decltype(steps)::value;
      if constexpr (lines > 0 && kSteps == kUnroll) {
#pragma GCC unroll 4
        for (int q = 0; q < lines; ++q) __builtin_prefetch(ahead + q * kLine, 0, 2);
        ahead += lines * kLine;
      }
#pragma GCC unroll 4
      for (int q = 0; q < kSteps; ++q, bk += next_row) {
        Vec<T> columns[NV];
        load_columns<T>(bk, next_panel, columns);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const T am = transposed_a ? base[0][m] : base[m / 3][m % 3 * lda + q];
#pragma GCC unroll 8
          for (int n = 0; n < NV; ++n) acc[m][n] = plus_product<T, M>(acc[m][n], am, columns[n]);
        }
        if constexpr (transposed_a) base[0] += lda;
      }
      if constexpr (!transposed_a) {
#pragma GCC unroll 8
        for (int g = 0; g < kBases; ++g) base[g] += kSteps;
      }
    };
    for (int64_t left = depth / kUnroll; left > 0; --left) add_steps(std::integral_constant<int, kUnroll>());
    if constexpr (kUnroll > 1)
      for (int64_t left = depth % kUnroll; left > 0; --left) add_steps(std::integral_constant<int, 1>());
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) {
        T* out = c + m * ldc + n * W;
        store(out, add ? load(out) + acc[m][n] : acc[m][n]);
      }
    add = true;
    k += depth;
  } while (k < K);
}

// The same for any number of rows up to kTileRows.
template <class T, int NV, bool transposed_a = false, int M = kTileRows, class S = T>
FASTLSTM_INLINE void tile_rows(int rows, int64_t K, const T* a, int64_t lda, const S* b, int64_t ldb, T* c,
                               int64_t ldc, bool add, int64_t next_panel = kPanel<T>) {
  if constexpr (M > 0) {
    if (rows == M) return tile<T, M, NV, transposed_a>(K, a, lda, b, ldb, c, ldc, add, next_panel);
    tile_rows<T, NV, transposed_a, M - 1>(rows, K, a, lda, b, ldb, c, ldc, add, next_panel);
  }
}

// c [rows, 2 * kPanel] (+)= a [rows, K] times two neighbouring packed panels, for up to kWideRows rows.
template <class T, class S>
FASTLSTM_INLINE void wide_product(int64_t rows, int64_t K, const T* a, int64_t lda, const S* panels, T* c,
                                  int64_t ldc, bool add) {
  constexpr int64_t W2 = kPanel<T>;
  tile_rows<T, 4, false, kWideRows>(static_cast<int>(rows), K, a, lda, panels, W2, c, ldc, add, K * W2);
}

// The same on a packed panel for M or fewer rows, but at least `least`, prefetching from `ahead` on.
template <int lines, class T, int least = 1, int M = kTileRows, class S = T>
FASTLSTM_INLINE void panel_rows(int rows, int64_t K, const T* a, int64_t lda, const S* panel, T* c,
                                int64_t ldc, bool add, const S* ahead) {
  if constexpr (M >= least) {
    if (rows == M)
      return tile<T, M, 2, false, lines>(K, a, lda, panel, kPanel<T>, c, ldc, add, kPanel<T>, ahead);
    panel_rows<lines, T, least, M - 1>(rows, K, a, lda, panel, c, ldc, add, ahead);
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
template <class T, class S>
FASTLSTM_INLINE void panel_product(int64_t rows, int64_t K, const T* a, int64_t lda, const S* panel, T* c,
                                   int64_t ldc, bool add = false, const S* next = nullptr) {
  constexpr int64_t W2 = kPanel<T>;
  int64_t k = 0;
  do {  // once even for K = 0, whose product is zero
    const int64_t pass = std::min(kDepth, K - k);
    const S* b = panel + k * W2;
    const S* ahead = next && k + pass == K ? next : b + pass * W2;
    for_row_tiles(rows, kTileRows, [&](int64_t m, int M) {
      constexpr int kLines = kPanelLines<T, S>, kFirst = (kLines + 1) / 2, kSecond = kLines / 2;
      constexpr int kLeast = kTileRows / 2;  // rows of one of several tiles, which are near-equal
      const T* a_rows = a + m * lda + k;
      T* out = c + m * ldc;
      if (M == rows)
        panel_rows<kLines, T>(M, pass, a_rows, lda, b, out, ldc, add || k > 0, ahead);
      else if (m == 0)
        panel_rows<kFirst, T, kLeast>(M, pass, a_rows, lda, b, out, ldc, add || k > 0, ahead);
      else if (m <= kTileRows)  // the second
        panel_rows<kSecond, T, kLeast>(M, pass, a_rows, lda, b, out, ldc, add || k > 0,
                                       ahead + pass / 2 * W2);
      else
        panel_rows<0, T, kLeast>(M, pass, a_rows, lda, b, out, ldc, add || k > 0, ahead);
    });
    k += kDepth;
  } while (k < K);
}

// c [rows, W] (+)= a [rows, K] times the first half of a packed panel.
template <class T, class S>
FASTLSTM_INLINE void half_panel_product(int64_t rows, int64_t K, const T* a, int64_t lda, const S* panel,
                                        T* c, int64_t ldc, bool add = false) {
  for_row_tiles(rows, kTileRows, [&](int64_t m, int M) {
    tile_rows<T, 1>(M, K, a + m * lda, lda, panel, kPanel<T>, c + m * ldc, ldc, add);
  });
}

// n <= kPanel elements `stride` apart into a row of a panel, zeros behind them.
template <class T, class S>
FASTLSTM_INLINE void copy_panel_row(const T* from, int64_t stride, int64_t n, S* to) {
  constexpr int64_t W = kWidth<T>;
  Real<T> row[kPanel<T>];
  if (stride != 1) {
    for (int64_t j = 0; j < kPanel<T>; ++j) row[j] = j < n ? real(from[j * stride]) : Real<T>(0);
    return store_panel_row(to, load(row), load(row + W));
  }
  const int first = static_cast<int>(std::min(W, n));
  store_panel_row(to, load_part(from, first), load_part(from + first, static_cast<int>(n) - first));
}

// c [rows, columns] (+)= a [rows, K] times a panel of fewer columns than a whole one, by way of `partial`
// [kTileRows, kPanel].
template <class T, bool transposed_a, class S>
FASTLSTM_INLINE void edge_tile(int rows, int64_t columns, int64_t K, const T* a, int64_t lda, const S* panel,
                               bool add, T* c, int64_t ldc, T* partial) {
  constexpr int64_t W = kWidth<T>, W2 = kPanel<T>;
  if (columns > W)
    tile_rows<T, 2, transposed_a>(rows, K, a, lda, panel, W2, partial, W2, false);
  else
    tile_rows<T, 1, transposed_a>(rows, K, a, lda, panel, W2, partial, W2, false);
  for (int q = 0; q < rows; ++q)
    for (int64_t i = 0; i < columns; i += W) {
      const int part = static_cast<int>(std::min(W, columns - i));
      T* out = c + q * ldc + i;
      const Vec<T> v = load(partial + q * W2 + i);
      store_part(out, add ? load_part(out, part) + v : v, part);
    }
}

// One pass of depth at a time for all columns: rows of a wide B are on pages of their own, and a tile that
// went down all of K would miss the TLB at every row.
template <bool transposed_a, class T, class B>
FASTLSTM_INLINE void small_product_of(const Product<T, B>& p) {
  constexpr int64_t W2 = kPanel<T>;
  T* panel = p.scratch;                                 // [kDepth, W2]
  T* partial = p.scratch + std::min(p.k, kDepth) * W2;  // [kTileRows, W2]
  int64_t k = 0;
  do {  // once even for K = 0, whose product is zero
    const int64_t depth = std::min(kDepth, p.k - k);
    const bool add = p.add || k > 0;
    for (int64_t j = 0; j < p.n; j += W2) {
      const int64_t columns = std::min(W2, p.n - j);
      const B* b = p.b + k * p.ldb + j;
      if (columns < W2)
        for (int64_t q = 0; q < depth; ++q) copy_panel_row(b + q * p.ldb, 1, columns, panel + q * W2);
      for_row_tiles(p.m, kTileRows, [&](int64_t r, int rows) {
        const T* a = p.a + (transposed_a ? k * p.lda + r : r * p.lda + k);
        T* c = p.c + r * p.ldc + j;
        if (columns < W2)
          edge_tile<T, transposed_a>(rows, columns, depth, a, p.lda, panel, add, c, p.ldc, partial);
        else
          tile_rows<T, 2, transposed_a>(rows, depth, a, p.lda, b, p.ldb, c, p.ldc, add);
      });
    }
    k += kDepth;
  } while (k < p.k);
}

template <class T>
void small_product(const Product<Real<T>, T>& p) {
  p.transposed_a ? small_product_of<true>(p) : small_product_of<false>(p);
}

// Elements of scratch that takes.
template <class T>
int64_t small_product_scratch(int64_t K) {
  return (std::min(K, kDepth) + kTileRows) * kPanel<T>;
}

}  // namespace fastlstm::FASTLSTM_ISA
