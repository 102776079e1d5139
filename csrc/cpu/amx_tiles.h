// AMX tiles: numbers in and out, products, packing. Included once, inside amx.cpp's target region.
//
// A tile of the left operand is 16 rows of 32 numbers where they lie. Tiles of the right one are packed as
// the instruction reads them, [16 pairs of depth][16 columns][2], 1 KiB each.
#pragma once

#include "cpu/amx.h"
#include "cpu/vec.h"

namespace fastlstm::amx {
namespace {

using V = Vec<float>;
constexpr int64_t kTile = kAmxRows * kAmxDepth;  // elements of a packed tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = kAmxRows;
  }
};

// This thread's tile registers, all of full size, for as long as this lives.
struct TileScope {
  TileScope() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

FASTLSTM_INLINE V widen(__m256i x) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
// The first n <= 16 numbers, the rest zero.
FASTLSTM_INLINE V get(const Bf16* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
}
FASTLSTM_INLINE void put(Bf16* p, V v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

// vec.h's activations with an estimated reciprocal and one step of Newton's method: 2^-22, of which bfloat16
// keeps 2^-9, in a third of the division's time.
struct Quick {
  static FASTLSTM_INLINE V reciprocal(V d) {
    const V r = (V)_mm512_rcp14_ps((__m512)d);
    return r * (2.0f - d * r);
  }
  static FASTLSTM_INLINE V sigmoid(V x) {
    // NaN passes: a comparison with it is false. Beyond 80 the reciprocal would lose its exponent.
    V z = -x;
    z = z > 80.0f ? splat<float>(80.0f) : z;
    z = z < -80.0f ? splat<float>(-80.0f) : z;
    V scale, p;
    reduce_exp<float>(z, scale, p);
    return reciprocal(1.0f + (scale + scale * p));
  }
  static FASTLSTM_INLINE V tanh(V x) {
    V z = x + x;
    z = z > 20.0f ? splat<float>(20.0f) : z;
    z = z < -20.0f ? splat<float>(-20.0f) : z;
    V scale, p;
    reduce_exp<float>(z, scale, p);
    const V em1 = scale * p + (scale - 1.0f);
    return em1 * reciprocal(em1 + 2.0f);
  }
};

// Tiles 0 to 3, [2 row tiles][2], += a [32, 32 depth] times packed [depth][2] tiles.
// Two row tiles share every load of a weight. Prefetching weights from the L2 gained nothing.
// `between` is called once for each tile of depth: vector work there runs while the tile unit multiplies.
template <class F>
FASTLSTM_INLINE void multiply_two(int64_t depth, const Bf16* a, int64_t lda, const Bf16* w, F&& between) {
  const int64_t bytes = lda * sizeof(Bf16);
  for (int64_t k = 0; k < depth; ++k, a += kAmxDepth, w += 2 * kTile) {
    _tile_loadd(4, a, bytes);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kAmxRows * lda, bytes);
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
  for (int64_t k = 0; k < depth; ++k, a += kAmxDepth, w += 2 * kTile) {
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

FASTLSTM_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// What multiply_two made to out [32, 32] with row stride ldo.
FASTLSTM_INLINE void store_two(float* out, int64_t ldo) {
  const int64_t bytes = ldo * sizeof(float);
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  _tile_stored(2, out + kAmxRows * ldo, bytes);
  _tile_stored(3, out + kAmxRows * ldo + 16, bytes);
}

// What multiply_one made to out [16, 64].
FASTLSTM_INLINE void store_one(float* out) {
  _tile_stored(0, out, 64 * sizeof(float));
  _tile_stored(1, out + 16, 64 * sizeof(float));
  _tile_stored(2, out + 32, 64 * sizeof(float));
  _tile_stored(3, out + 48, 64 * sizeof(float));
}

}  // namespace

int64_t packed_gates_size(int64_t H, int64_t K) {
  return (H + kAmxWidth - 1) / kAmxWidth * 4 * kAmxWidth * padded(K);
}

// A block of 16 units: [gates i, f | g, o][depth][2] tiles.
void pack_gates(const Bf16* weight, int64_t H, int64_t K, int64_t begin, int64_t end, Bf16* packed) {
  const int64_t depth = padded(K) / kAmxDepth;
  for (int64_t u0 = begin; u0 < end; u0 += kAmxWidth)
    for (int64_t gate = 0; gate < 4; ++gate) {
      Bf16* to = packed + (u0 / kAmxWidth * 4 + gate / 2 * 2) * depth * kTile + gate % 2 * kTile;
      for (int64_t k = 0; k < depth; ++k, to += 2 * kTile) {
        const int n = static_cast<int>(std::min(kAmxDepth, K - k * kAmxDepth));
        V rows[16];  // of 16 pairs each
        for (int64_t j = 0; j < 16; ++j) {
          const Bf16* from = weight + (gate * H + u0 + j) * K + k * kAmxDepth;
          rows[j] = u0 + j < H ? (V)_mm512_maskz_loadu_epi16(0xffffffffu >> (32 - n), from) : V{};
        }
        transpose<float>(rows);
        for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * 32, (__m512i)rows[j]);
      }
    }
}

int64_t packed_columns_size(int64_t K, int64_t N) { return padded(K) * padded(N); }

// 32 columns: [depth][2] tiles.
void pack_columns(const Bf16* b, int64_t K, int64_t N, int64_t begin, int64_t end, Bf16* packed) {
  for (int64_t n0 = begin; n0 < end; n0 += kAmxUnits) {
    Bf16* to = packed + n0 * padded(K);
    for (int64_t k0 = 0; k0 < padded(K); k0 += kAmxDepth, to += 2 * kTile)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t n = std::clamp<int64_t>(N - n0 - half * 16, 0, 16);
        const auto row = [&](int64_t k) {
          const __mmask16 mask = k < K ? (1u << n) - 1 : 0;
          return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b + k * N + n0 + half * 16));
        };
        for (int64_t p = 0; p < 16; ++p) {
          const __m512i low = row(k0 + 2 * p), high = row(k0 + 2 * p + 1);
          _mm512_storeu_si512(to + half * kTile + p * 32, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
      }
  }
}

}  // namespace fastlstm::amx
