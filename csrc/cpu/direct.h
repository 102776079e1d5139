// Products of a few rows with weights as forward finds them stored, without packing: dot products along the
// weights' rows.
#pragma once

#include "cpu/pack_forward.h"

namespace fastlstm::FASTLSTM_ISA {

// Rows at a time that read a weight as stored: their sums, four gates each, fill half the registers.
#if FASTLSTM_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kDirectTile = 4;
#else
constexpr int kDirectTile = 2;
#endif

// Vectors that a lane adds one after the other. Longer rows are multiplied in parts, each summed separately,
// so that rounding errors grow with a part and not with all of K.
constexpr int64_t kDirectDepth = 256;

// acc[row][q] += the products, lane by lane, of R rows of v [., K], `stride` apart, with four rows w [K] of a
// weight as stored. Eight at a time gained nothing.
template <class T, int R>
FASTLSTM_INLINE void multiply_rows(const Real<T>* v, int64_t stride, const T* const (&w)[4], int64_t K,
                                   Vec<T> (*acc)[4]) {
  constexpr int W = kWidth<T>;
  const int64_t whole = K / W * W;
  for (int64_t k = 0; k < whole; k += W)
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
      const Vec<T> part = load(w[gate] + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][gate] += load(v + r * stride + k) * part;
    }
  if (const int tail = static_cast<int>(K - whole))
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
      const Vec<T> part = load_part(w[gate] + whole, tail);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][gate] += load_part(v + r * stride + whole, tail) * part;
    }
}

// Returns the padded length of a row of K numbers in split order, for products with unpacked bfloat16
// weights: of each 2W numbers the even-indexed ones come first, as the halves of a weight vector are widened.
// Padding is zero.
template <class T>
int64_t split_stride(int64_t K) {
  return (K + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}
template <class T>
void split_rows(const Real<T>* v, int64_t rows, int64_t K, Real<T>* out) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t r = 0; r < rows; ++r, v += K)
    for (int64_t k = 0; k < split_stride<T>(K); k += 2 * W, out += 2 * W)
      for (int64_t j = 0; j < W; ++j) {
        out[j] = k + 2 * j < K ? v[k + 2 * j] : Real<T>(0);
        out[W + j] = k + 2 * j + 1 < K ? v[k + 2 * j + 1] : Real<T>(0);
      }
}

// As multiply_rows, of rows of split_rows.
template <int R>
FASTLSTM_INLINE void multiply_split_rows(const float* v, int64_t stride, const Bf16* const (&w)[4], int64_t K,
                                         Vec<float> (*acc)[4]) {
  constexpr int W = kWidth<float>;
  const auto step = [&](int64_t k, int n) {
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
      Bits<float> pairs = {};
      if (n == 2 * W)
        std::memcpy(&pairs, w[gate] + k, sizeof(pairs));
      else
        std::memcpy(&pairs, w[gate] + k, n * sizeof(Bf16));
      const Vec<float> even = bit_cast<Vec<float>>(pairs << 16),
                       odd = bit_cast<Vec<float>>(pairs & 0xffff0000u);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r][gate] += load(v + r * stride + k) * even;
        acc[r][gate] += load(v + r * stride + k + W) * odd;
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 * W <= K; k += 2 * W) step(k, 2 * W);
  if (k < K) step(k, static_cast<int>(K - k));
}

// Rows v and the weight as stored, [4H, K], whose rows they are multiplied with: [., K], or by split_rows.
template <class T>
struct Factors {
  const Real<T>* v;
  const T* weight;
  int64_t K;
  static constexpr bool split = std::is_same_v<T, Bf16>;
  int64_t stride() const { return split ? split_stride<T>(K) : K; }
};

// pre [rows][4][gap], rows kGateBlock apart, (+)= the sum of F products for up to kDirectTile rows and the
// unit block at u0.
template <class T, int F, int R = kDirectTile>
FASTLSTM_INLINE void direct_rows(int rows, const Factors<T> (&factors)[F], int64_t H, int64_t u0, int64_t gap,
                                 Real<T>* pre, bool add) {
  if constexpr (R > 0) {
    if (rows < R) return direct_rows<T, F, R - 1>(rows, factors, H, u0, gap, pre, add);
    constexpr int W = kWidth<T>;
    const int n = static_cast<int>(std::min<int64_t>(W, H - u0));
    constexpr int64_t part = kDirectDepth * W;
    Vec<T> lanes[R][4][W];
    for (int u = 0; u < W; ++u) {
      Vec<T> acc[R][4] = {}, whole_parts[R][4];
      bool several = false;
      for (int f = 0; u < n && f < F; ++f) {
        const auto& [v, weight, K] = factors[f];
        const int64_t stride = factors[f].stride();
        const T* w[4];
        for (int64_t gate = 0; gate < 4; ++gate) w[gate] = weight + (gate * H + u0 + u) * K;
        for (int64_t k = 0; k < K; k += part) {
          if (k > 0) {
            for (int r = 0; r < R; ++r)
              for (int gate = 0; gate < 4; ++gate) {
                whole_parts[r][gate] = several ? whole_parts[r][gate] + acc[r][gate] : acc[r][gate];
                acc[r][gate] = Vec<T>{};
              }
            several = true;
            for (int64_t gate = 0; gate < 4; ++gate) w[gate] += part;
          }
          const int64_t depth = std::min(part, K - k);
          if constexpr (Factors<T>::split)
            multiply_split_rows<R>(v + k, stride, w, depth, acc);
          else
            multiply_rows<T, R>(v + k, stride, w, depth, acc);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int gate = 0; gate < 4; ++gate)
          lanes[r][gate][u] = several ? whole_parts[r][gate] + acc[r][gate] : acc[r][gate];
    }
    for (int r = 0; r < R; ++r)
      for (int gate = 0; gate < 4; ++gate) {
        Real<T>* out = pre + r * kGateBlock<T> + gate * gap;
        const Vec<T> dots = sums<T>(lanes[r][gate]);
        store_part(out, add ? load_part(out, n) + dots : dots, n);
      }
  }
}

// The same for any number of rows.
template <class T, int F>
FASTLSTM_INLINE void direct_product(int64_t rows, const Factors<T> (&factors)[F], int64_t H, int64_t u0,
                                    int64_t gap, Real<T>* pre, bool add) {
  for_row_tiles(rows, kDirectTile, [&](int64_t first, int R) {
    Factors<T> own[F];
    for (int f = 0; f < F; ++f) {
      own[f] = factors[f];
      own[f].v += first * own[f].stride();
    }
    direct_rows<T, F>(R, own, H, u0, gap, pre + first * kGateBlock<T>, add);
  });
}

}  // namespace fastlstm::FASTLSTM_ISA
