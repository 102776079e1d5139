// Products of quantized rows with a block of int8 weights, for one instruction set. Included by
// cpu/int8_kernels.h, inside the target region of its includer.
#pragma once

#include "cpu/gemm.h"
#include "cpu/int8_numbers.h"

namespace fastlstm::FASTLSTM_ISA {

using int8::Weight;

constexpr int64_t kInt8Block = 4 * kLanes;  // rows of a block of weights
// A register tile: up to 6 rows x 4 vectors with AVX-512 and up to 2 rows, otherwise up to 6 x 2, twice per
// block.
constexpr int kInt8TileRows = 6;
template <int M>
constexpr int kInt8TileVectors = FASTLSTM_VECTOR_BYTES == 64 || M <= 2 ? 4 : 2;

// Quantized rows, one after the other.
struct FactorRows {
  Factor* q;
  Quantization* of_row;
  int64_t K;

  int64_t stride() const { return factor_stride(K); }
  FactorRows from(int64_t row) const { return {q + row * stride(), of_row + row, K}; }
  void quantize(int64_t row, const float* v) const { of_row[row] = quantize_row(v, K, q + row * stride()); }
};

// The sum of (q - zero) w, from that of q w and the weights' row sums at offset.
FASTLSTM_INLINE Ints without_zero(Ints sum, const Quantization& row, const int32_t* offset) {
  return sum - row.zero * load_ints(offset);
}
// out [kLanes] (+)= sum as numbers.
FASTLSTM_INLINE void put_scaled(Ints sum, const Quantization& row, const float* weight_scale, float* out,
                                bool add) {
  const Vec<float> product = to_float(sum), scale = load(weight_scale) * row.scale;
  store(out, add ? multiply_add(product, scale, load(out)) : product * scale);
}

// sums[m][v] of M rows with V vectors of a block. Few rows keep two sums each, since one waits for the
// latency of its instruction.
template <int M, int V>
FASTLSTM_INLINE void tile_sums(const FactorRows& a, const int8_t* vectors, const int32_t* offset,
                               Ints (&sums)[M][V]) {
  constexpr int64_t kStep = kInt8Block * kGroup;
  constexpr int kParts = M <= 2 && FASTLSTM_VECTOR_BYTES == 64 ? 2 : 1;
  const int64_t n = int8::groups(a.K, kGroup), stride = a.stride();
  Ints acc[kParts][M][V] = {};
  const auto step = [&](int64_t g, int part) __attribute__((always_inline)) {
    WeightVector w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load_weights(vectors + g * kStep + v * kLanes * kGroup);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Ints factors = broadcast(a.q + m * stride + g * kGroup);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[part][m][v] = dot(acc[part][m][v], factors, w[v]);
    }
  };
  int64_t g = 0;
  if constexpr (kParts == 2)
    for (; g + 1 < n; g += 2) step(g, 0), step(g + 1, 1);
  for (; g < n; ++g) step(g, 0);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Ints sum = acc[0][m][v];
      if constexpr (kParts == 2) sum += acc[1][m][v];
      sums[m][v] = without_zero(sum, a.of_row[m], offset + v * kLanes);
    }
}

// out [rows][4][kLanes] (+)= the products of M rows with a block.
template <int M>
__attribute__((noinline)) void tile_products(const FactorRows& a, const Weight& w, float* out, bool add) {
  constexpr int V = kInt8TileVectors<M>;
  for (int64_t v0 = 0; v0 < 4 * kLanes; v0 += V * kLanes) {
    Ints sums[M][V];
    tile_sums<M, V>(a, w.packed + v0 * kGroup, w.offset + v0, sums);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = v0 + v * kLanes;
        put_scaled(sums[m][v], a.of_row[m], w.scale + at, out + m * kInt8Block + at, add);
      }
  }
}
template <int M = kInt8TileRows>
FASTLSTM_INLINE void products_of(int rows, const FactorRows& a, const Weight& w, float* out, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return tile_products<M>(a, w, out, add);
    products_of<M - 1>(rows, a, w, out, add);
  }
}

FASTLSTM_INLINE Weight block_of(const Weight& w, int64_t K, int64_t block) {
  return {w.packed + block * int8::block_size(K, {kLanes, kGroup}), w.scale + block * kInt8Block,
          w.offset + block * kInt8Block};
}

// out [rows][4][kLanes] (+)= the products of rows with a block.
FASTLSTM_INLINE void vector_products(int64_t rows, const FactorRows& a, const Weight& w, float* out,
                                     bool add) {
  for_row_tiles(rows, kInt8TileRows, [&](int64_t first, int n) {
    products_of(n, a.from(first), w, out + first * kInt8Block, add);
  });
}

#if !defined(FASTLSTM_INT8_AMX)
// What the time loop asks of the products of an instruction set; see cpu/int8_tiles_amx.h.
struct ProductScope {
  explicit ProductScope(bool) {}
};
constexpr int64_t kInt8ProductRows = kInt8TileRows;  // that are multiplied at once
constexpr int64_t kInt8SpareRows = 0;                // quantized rows that may be read past the last
template <class F>
FASTLSTM_INLINE void for_product_rows(int64_t rows, F&& f) {
  for_row_tiles(rows, kInt8TileRows, f);
}
FASTLSTM_INLINE void block_products(int64_t rows, const FactorRows& a, const Weight& w, float* out,
                                    bool add) {
  vector_products(rows, a, w, out, add);
}
FASTLSTM_INLINE void row_sums(const FactorRows& a, const Weight& w, Ints (&row)[4]) {
  Ints sums[1][4];
  tile_sums<1, 4>(a, w.packed, w.offset, sums);
  std::memcpy(row, sums, sizeof(row));
}
#endif

}  // namespace fastlstm::FASTLSTM_ISA
