// How forward lays out a weight [4H, K]: in blocks of units, packed for the tiles of gemm.h.
#pragma once

#include <algorithm>

#include "cpu/gemm.h"

namespace fastlstm::FASTLSTM_ISA {

// A unit block is one vector of W units; its weights are packed as two panels, [K][i, f][W] and [K][g, o][W].
// The last block has n units, fewer than W if H is no multiple: where the 4n columns of its gates fit fewer
// than four vectors they lie side by side, and the product of a row is [4][gap] instead of [4][W].
template <class T>
constexpr int64_t kGateBlock = 4 * kWidth<T>;
template <class T>
FASTLSTM_INLINE int64_t gate_gap(int64_t H, int64_t u0) {
  return fastlstm::gate_gap(H, u0, kWidth<T>);
}

template <class T>
int64_t unit_blocks(int64_t H) {
  return (H + kWidth<T> - 1) / kWidth<T>;
}

template <class T>
int64_t forward_packed_size(int64_t H, int64_t K) {
  return unit_blocks<T>(H) * K * kGateBlock<T>;
}

// Columns of a weight's rows that are packed at a time: their panel stays in L1 until all gates of its lines
// are written.
template <class T>
constexpr int64_t kColumns = 8192 / (kPanel<T> * sizeof(Real<T>));

// The last units from u0 on of a weight [4H, K], n of them, into panels of columns: [K][4n], zeros behind.
template <class T, class S>
void pack_side_by_side(const T* weight, int64_t H, int64_t K, int64_t u0, S* out) {
  constexpr bool pairs = std::is_same_v<S, PanelBf16>;  // whose halves are one, and both are read
  constexpr int64_t W = kWidth<T>, W2 = kPanel<T>, whole = pairs ? W2 : W;
  const int64_t n = H - u0, padded = (4 * n + whole - 1) / whole * whole;
  for (int64_t k0 = 0; k0 < K; k0 += kColumns<T>) {
    const int64_t k1 = std::min(k0 + kColumns<T>, K);
    for (int64_t j = 0; j < padded; ++j) {
      const T* row = j < 4 * n ? weight + (j / n * H + u0 + j % n) * K : nullptr;
      S* to = out + j / W2 * K * W2 + (pairs ? 2 * (j % W) + j % W2 / W : j % W2);
      for (int64_t k = k0; k < k1; ++k) {
        if constexpr (pairs)
          to[k * W2].bits = row ? row[k] : 0;
        else
          to[k * W2] = row ? real(row[k]) : S(0);
      }
    }
  }
}

// Units [u0, u0 + W) of a weight [4H, K] into out [2][K][2][W]; from H on the last unit again, for results
// that nobody reads. Side by side where gate_gap says so.
template <class T, class S>
void pack_block(const T* weight, int64_t H, int64_t K, int64_t u0, S* out) {
  // bfloat16: i and f in pairs, then g and o, of which one transposition is enough.
  constexpr bool pairs = std::is_same_v<T, Bf16>;
  constexpr int64_t W = kWidth<T>, W2 = kPanel<T>;
  if (gate_gap<T>(H, u0) < W) return pack_side_by_side(weight, H, K, u0, out);
  for (int64_t k0 = 0; k0 < K; k0 += kColumns<T>)
    for (int64_t gate = 0; gate < 4; gate += pairs ? 2 : 1) {
      const T* row[W];
      for (int64_t u = 0; u < W; ++u) row[u] = weight + (gate * H + std::min(u0 + u, H - 1)) * K;
      S* to = out + gate / 2 * K * W2 + gate % 2 * W;
      // Rows too short for hardware prefetching: the next gate's, of this block or the next.
      if (k0 == 0 && K * int64_t(sizeof(T)) <= kPackPrefetchMaxBytes) {
        const int64_t from = (gate < 3 ? (gate + 1) * H + u0 : std::min(u0 + W, H - 1)) * K;
        const int64_t to_read = std::min(W * K, 4 * H * K - from);
        for (int64_t i = 0; i < to_read; i += 64 / sizeof(T)) __builtin_prefetch(weight + from + i, 0, 3);
      }
      const int64_t k1 = std::min(k0 + kColumns<T>, K);
      int64_t k = k0;
      for (; k + W <= k1; k += W) {
        Vec<T> block[W];
#pragma GCC unroll 16
        for (int64_t u = 0; u < W; ++u) {
          block[u] = load(row[u] + k);
          if constexpr (pairs) block[u] = pairs_of(block[u], load(row[u] + H * K + k));
        }
        transpose<T>(block);
#pragma GCC unroll 16
        for (int64_t j = 0; j < W; ++j) {
          if constexpr (std::is_same_v<T, S>) {
            store(to + (k + j) * W2, block[j]);
          } else {
            const Bits<T> both = bit_cast<Bits<T>>(block[j]);
            store_panel_row(to + (k + j) * W2, bit_cast<Vec<T>>(both << 16),
                            bit_cast<Vec<T>>(both & 0xffff0000u));
          }
        }
      }
      for (; k < k1; ++k)
#pragma GCC unroll 16
        for (int64_t u = 0; u < W; ++u) {
          if constexpr (std::is_same_v<S, PanelBf16>)
            to[k * W2 + 2 * u].bits = row[u][k], to[k * W2 + 2 * u + 1].bits = row[u][H * K + k];
          else if constexpr (pairs)
            to[k * W2 + u] = real(row[u][k]), to[k * W2 + W + u] = real(row[u][H * K + k]);
          else
            to[k * W2 + u] = row[u][k];
        }
    }
}

template <class T, class S>
void pack_forward(const T* weight, int64_t H, int64_t K, int64_t begin, int64_t end, S* packed) {
  for (int64_t u = begin; u < end; u += kWidth<T>)
    pack_block(weight, H, K, u, packed + u / kWidth<T> * K * kGateBlock<T>);
}

}  // namespace fastlstm::FASTLSTM_ISA
