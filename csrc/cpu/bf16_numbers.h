// What the kernels of cpu/bf16.h share: numbers in and out, rounding of factors, packed weights. Included by
// cpu/bf16_tiles_*.h, inside their target regions.
//
// A tile of the left operand is 16 rows of 32 numbers where they lie. Tiles of the right one are packed as
// both instructions read them, [16 pairs of depth][16 columns][2], 1 KiB each.
#pragma once

#include "cpu/bf16.h"
#include "cpu/vec.h"

namespace fastlstm::FASTLSTM_ISA {

using bf16::BackwardArgs;
using bf16::Bf16;
using bf16::ForwardArgs;
using bf16::GemmArgs;
using bf16::kBlock;
using bf16::kTileDepth;
using bf16::kTileRows;
using bf16::kUnits;
using bf16::padded;
using bf16::row_stride;

using V = Vec<float>;
static_assert(kWidth<float> == kBlock);            // blocks of the saved gates are those of the float kernels
constexpr int64_t kTile = kTileRows * kTileDepth;  // elements of a packed tile

FASTLSTM_INLINE V widen(__m256i x) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
FASTLSTM_INLINE __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
// The first n <= 16 numbers, the rest zero.
FASTLSTM_INLINE V get(const Bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
FASTLSTM_INLINE V get(const float* p, int n) { return load_part(p, n); }
FASTLSTM_INLINE void put(Bf16* p, V v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
FASTLSTM_INLINE void put(float* p, V v, int n) { store_part(p, v, n); }

// The first n <= 16 numbers as factors, the rest zero.
FASTLSTM_INLINE __m256i factors16(const Bf16* p, int64_t n) { return _mm256_maskz_loadu_epi16(first(n), p); }
FASTLSTM_INLINE __m256i factors16(const float* p, int64_t n) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(n), p));
}
// The same of 1 <= n <= 32.
FASTLSTM_INLINE __m512i factors32(const Bf16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(0xffffffffu >> (32 - n), p);
}
FASTLSTM_INLINE __m512i factors32(const float* p, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first(std::min<int64_t>(n, 16)), p),
               high = _mm512_maskz_loadu_ps(n > 16 ? first(n - 16) : 0, p + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
// A row of n numbers as factors.
FASTLSTM_INLINE void round_row(const Bf16* from, int64_t n, Bf16* to) {
  std::memcpy(to, from, n * sizeof(Bf16));
}
FASTLSTM_INLINE void round_row(const float* from, int64_t n, Bf16* to) {
  for (int64_t k = 0; k < n; k += 32) {
    const int64_t count = std::min<int64_t>(32, n - k);
    _mm512_mask_storeu_epi16(to + k, 0xffffffffu >> (32 - count), factors32(from + k, count));
  }
}

// A tile whose columns are rows of a matrix of row stride ld: of `rows` rows n numbers each, the rest zero.
template <class T>
FASTLSTM_INLINE void pack_tile(const T* from, int64_t ld, int64_t rows, int64_t n, Bf16* to) {
  V lanes[16];  // of 16 pairs each
  for (int64_t j = 0; j < 16; ++j) lanes[j] = j < rows ? (V)factors32(from + j * ld, n) : V{};
  transpose<float>(lanes);
  for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * 32, (__m512i)lanes[j]);
}

// A block of 16 units: [gates i, f | g, o][depth][2] tiles.
template <class T>
void pack_gates(const T* weight, int64_t H, int64_t K, int64_t begin, int64_t end, Bf16* packed) {
  const int64_t depth = padded(K) / kTileDepth;
  for (int64_t u0 = begin; u0 < end; u0 += kBlock)
    for (int64_t gate = 0; gate < 4; ++gate) {
      Bf16* to = packed + (u0 / kBlock * 4 + gate / 2 * 2) * depth * kTile + gate % 2 * kTile;
      for (int64_t k = 0; k < padded(K); k += kTileDepth, to += 2 * kTile)
        pack_tile(weight + (gate * H + u0) * K + k, K, H - u0, std::min(kTileDepth, K - k), to);
    }
}

// 32 rows of a weight [N, K] as columns: [depth][2] tiles.
template <class T>
void pack_rows(const T* weight, int64_t N, int64_t K, int64_t begin, int64_t end, Bf16* packed) {
  for (int64_t n0 = begin; n0 < end; n0 += kUnits) {
    Bf16* to = packed + n0 * padded(K);
    for (int64_t k = 0; k < padded(K); k += kTileDepth)
      for (int64_t n = n0; n < n0 + kUnits; n += 16, to += kTile)
        pack_tile(weight + n * K + k, K, N - n, std::min(kTileDepth, K - k), to);
  }
}

// 32 columns: [depth][2] tiles.
template <class T>
void pack_columns(const T* b, int64_t K, int64_t N, int64_t ldb, int64_t begin, int64_t end, Bf16* packed) {
  for (int64_t n0 = begin; n0 < end; n0 += kUnits) {
    Bf16* to = packed + n0 * padded(K);
    for (int64_t k0 = 0; k0 < padded(K); k0 += kTileDepth, to += 2 * kTile)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t n = std::clamp<int64_t>(N - n0 - half * 16, 0, 16);
        const auto row = [&](int64_t k) {
          return k < K ? _mm512_cvtepu16_epi32(factors16(b + k * ldb + n0 + half * 16, n)) : __m512i{};
        };
        for (int64_t p = 0; p < 16; ++p) {
          const __m512i low = row(k0 + 2 * p), high = row(k0 + 2 * p + 1);
          _mm512_storeu_si512(to + half * kTile + p * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
