// Packing, forward and backward in AMX tiles. Included once, by amx.cpp, inside its target region.
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

// Tiles 0 to 3, [R][2], += a [16 R, 32 depth] times packed [depth][2] tiles.
// Two row tiles share every load of a weight. Prefetching weights from the L2 gained nothing.
// `between` is called once for each tile of depth: vector work there runs while the tile unit multiplies.
template <int R, class F>
FASTLSTM_INLINE void multiply_pair(int64_t depth, const Bf16* a, int64_t lda, const Bf16* w, F&& between) {
  const int64_t bytes = lda * sizeof(Bf16);
  for (int64_t k = 0; k < depth; ++k, a += kAmxDepth, w += 2 * kTile) {
    _tile_loadd(4, a, bytes);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2) {
      _tile_loadd(5, a + kAmxRows * lda, bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    between();
  }
}

FASTLSTM_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// out [16 R, 32] with row stride ldo.
template <int R>
FASTLSTM_INLINE void store_pair(float* out, int64_t ldo) {
  const int64_t bytes = ldo * sizeof(float);
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + 16, bytes);
  if constexpr (R == 2) {
    _tile_stored(2, out + kAmxRows * ldo, bytes);
    _tile_stored(3, out + kAmxRows * ldo + 16, bytes);
  }
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

int64_t forward_scratch(int64_t I) { return kAmxGroup * padded(I) + kAmxDepth; }

namespace {

// pre [16 R][4][16] of one block of units.
template <int R, class F>
FASTLSTM_INLINE void gate_products(const ForwardArgs& a, const Bf16* x, const Bf16* h, int64_t u0, float* pre,
                                   F&& between) {
  const int64_t ldx = padded(a.I), ldh = padded(a.H), dx = ldx / kAmxDepth, dh = ldh / kAmxDepth;
  const Bf16* w_ih = a.w_ih + u0 / kAmxWidth * 4 * dx * kTile;
  const Bf16* w_hh = a.w_hh + u0 / kAmxWidth * 4 * dh * kTile;
  for (int64_t pair = 0; pair < 2; ++pair) {
    clear_tiles();
    multiply_pair<R>(dx, x, ldx, w_ih + pair * dx * 2 * kTile, between);
    multiply_pair<R>(dh, h, ldh, w_hh + pair * dh * 2 * kTile, between);
    store_pair<R>(pre + pair * 32, 64);
  }
}

// The cell for units [u0, u0 + n) of sorted row r at step t, from the products pre [4][16].
FASTLSTM_INLINE void forward_cell(const ForwardArgs& a, int64_t t, int64_t next_t, int64_t r, int64_t u0,
                                  int n, const V* bias, const float* pre, Bf16* h_out) {
  const int64_t H = a.H, row = t * a.rows.B + a.rows.batch_row_at(r);
  const Gates<V> gate = activate<Quick>(Gates<V>{load(pre) + bias[0], load(pre + 16) + bias[1],
                                                 load(pre + 32) + bias[2], load(pre + 48) + bias[3]});
  float* c = a.c + r * H + u0;
  const V c_prev = a.rows.fresh_at(t, r) ? V{} : load_part(c, n);
  const V c_next = next_c(gate, c_prev);
  const V h = gate.o * Quick::tanh(c_next);
  if (a.gates) {
    Bf16* saved = a.gates + (a.rows.offset_at(t) + r) * 4 * H + 4 * u0;
    put(saved, gate.i, n);
    put(saved + n, gate.f, n);
    put(saved + 2 * n, gate.g, n);
    put(saved + 3 * n, gate.o, n);
  }
  store_part(c, c_next, n);
  if (a.cells) put(a.cells + row * a.cells_stride + u0, c_next, n);
  put(a.y + row * a.y_stride + u0, h, n);
  const bool cleared =
      a.rows.fresh && next_t >= 0 && r < a.rows.count_at(next_t) && a.rows.fresh_at(next_t, r);
  put(h_out + r * padded(H) + u0, cleared ? V{} : h, n);
}

// Rows [r, end) of units [u0, u0 + n) whose products are made and whose cells are not.
struct PendingCells {
  const ForwardArgs& a;
  int64_t t, next_t;
  Bf16* h_out;
  int64_t r = 0, end = 0, u0 = 0;
  int n = 0;
  V bias[4] = {};
  const float* pre = nullptr;  // of row r

  __attribute__((noinline)) void one() {
    if (n == kAmxWidth)
      forward_cell(a, t, next_t, r, u0, kAmxWidth, bias, pre, h_out);
    else
      forward_cell(a, t, next_t, r, u0, n, bias, pre, h_out);
    ++r;
    pre += 64;
  }
  FASTLSTM_INLINE void next() {
    if (r < end) one();
  }
  void finish() {
    while (r < end) one();
  }
};

}  // namespace

void forward(const ForwardArgs& a, const Member& me) {
  const TileScope tiles;
  const int64_t steps = a.rows.T, B = a.rows.B, H = a.H, I = a.I, ldx = padded(I), ldh = padded(H);
  Bf16* x = a.scratch + me.index * forward_scratch(I);
  std::fill_n(x, forward_scratch(I), Bf16(0));  // the padding of a row is multiplied by zeros
  alignas(64) float buffers[2][2 * kAmxRows * 64];
  int buffer = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = a.reverse ? steps - 1 - s : s;
    const int64_t next_t = s + 1 == steps ? -1 : (a.reverse ? t - 1 : t + 1);
    const int64_t end = std::min(me.row_end, a.rows.count_at(t));
    const Bf16* h_in = a.h + (s % 2) * (B + kAmxRows) * ldh;
    Bf16* h_out = a.h + ((s + 1) % 2) * (B + kAmxRows) * ldh;
    PendingCells pending{a, t, next_t, h_out};
    for (int64_t g0 = me.row_begin; g0 < end; g0 += kAmxGroup) {
      const int64_t g1 = std::min(end, g0 + kAmxGroup);
      for (int64_t r = g0; r < g1; ++r)
        std::memcpy(x + (r - g0) * ldx, a.x + (t * B + a.rows.batch_row_at(r)) * I, I * sizeof(Bf16));
      for (int64_t u0 = me.unit_begin; u0 < me.unit_end; u0 += kAmxWidth)
        for (int64_t r0 = g0; r0 < g1; r0 += 2 * kAmxRows) {
          const int64_t r1 = std::min(g1, r0 + 2 * kAmxRows);
          float* pre = buffers[buffer ^= 1];
          const auto between = [&] { pending.next(); };
          // Rows behind the last are computed and not read.
          if (r1 - r0 > kAmxRows)
            gate_products<2>(a, x + (r0 - g0) * ldx, h_in + r0 * ldh, u0, pre, between);
          else
            gate_products<1>(a, x + (r0 - g0) * ldx, h_in + r0 * ldh, u0, pre, between);
          pending.finish();
          pending.r = r0;
          pending.end = r1;
          pending.u0 = u0;
          pending.n = static_cast<int>(std::min(kAmxWidth, H - u0));
          for (int64_t gate = 0; gate < 4; ++gate)
            pending.bias[gate] = load_part(a.bias + gate * H + u0, pending.n);
          pending.pre = pre;
        }
    }
    pending.finish();
    if (me.barrier) me.barrier->wait();
  }
}

namespace {

// The cell's gradients for units [u0, u0 + n) of sorted row r at step t.
FASTLSTM_INLINE void backward_cell(const BackwardArgs& a, int64_t t, int64_t r, int64_t before, int64_t held,
                                   int64_t u0, int n, float* db) {
  const int64_t H = a.H, B = a.rows.B, b = a.rows.batch_row_at(r), row = t * B + b;
  const int64_t packed_row = a.rows.offset_at(t) + r;
  const Bf16* g = a.gates + packed_row * 4 * H + 4 * u0;
  if (r < held) {  // what the next step reads: too little at a time for the hardware to foresee
    const Bf16* next = a.gates + (a.rows.offset_at(before) + r) * 4 * H + 4 * u0;
    __builtin_prefetch(next);
    __builtin_prefetch(next + 32);
  }
  V dh = load_part(a.dh + r * padded(H) + u0, n);
  if (a.dy) dh += get(a.dy + row * a.dy_stride + u0, n);
  V dc = load_part(a.dc + r * H + u0, n);
  if (a.dcells) dc += get(a.dcells + row * a.dcells_stride + u0, n);
  const bool fresh = a.rows.fresh_at(t, r);
  const V c_prev = fresh      ? V{}
                   : r < held ? get(a.cells + (before * B + b) * a.cells_stride + u0, n)
                              : load_part(a.c0 + r * H + u0, n);
  const V tanh_c = Quick::tanh(get(a.cells + row * a.cells_stride + u0, n));
  const Gates<V> gate = {get(g, n), get(g + n, n), get(g + 2 * n, n), get(g + 3 * n, n)};
  const Gates<V> d = cell_backward(gate, c_prev, tanh_c, dh, dc);
  const auto sum = [&](float* to, V v) { store_part(to, load_part(to, n) + v, n); };
  sum(db + u0, d.i);
  sum(db + H + u0, d.f);
  sum(db + 2 * H + u0, d.g);
  sum(db + 3 * H + u0, d.o);
  Bf16* out = a.dgates + (packed_row - a.base) * padded(4 * H) + u0;
  put(out, d.i, n);
  put(out + H, d.f, n);
  put(out + 2 * H, d.g, n);
  put(out + 3 * H, d.o, n);
  store_part(a.dc + r * H + u0, fresh ? V{} : dc, n);
}

}  // namespace

void backward(const BackwardArgs& a, const Member& me) {
  const TileScope tiles;
  const int64_t steps = a.rows.T, H = a.H, ld = padded(H), ldg = padded(4 * H);
  alignas(64) float dh[2 * kAmxRows * 32];
  float* db = a.db + me.index * 4 * H;
  for (int64_t s = a.first + a.steps - 1; s >= a.first; --s) {
    const int64_t t = a.reverse ? steps - 1 - s : s;
    const int64_t before = s == 0 ? -1 : (a.reverse ? t + 1 : t - 1);
    const int64_t held = before < 0 ? 0 : a.rows.count_at(before);
    const int64_t end = std::min(me.row_end, a.rows.count_at(t));
    for (int64_t r = me.row_begin; r < end; ++r) {
      int64_t u0 = me.unit_begin;
      for (; u0 + kAmxWidth <= me.unit_end; u0 += kAmxWidth)
        backward_cell(a, t, r, before, held, u0, kAmxWidth, db);
      if (u0 < me.unit_end) backward_cell(a, t, r, before, held, u0, static_cast<int>(me.unit_end - u0), db);
    }
    if (me.barrier) me.barrier->wait();
    const Bf16* dgates = a.dgates + (a.rows.offset_at(t) - a.base) * ldg;
    for (int64_t n0 = me.unit_begin; n0 < me.unit_end; n0 += kAmxUnits)
      for (int64_t r0 = me.row_begin; r0 < end; r0 += 2 * kAmxRows) {
        const int64_t r1 = std::min(end, r0 + 2 * kAmxRows);
        const Bf16* w = a.w_hh + n0 * ldg;
        clear_tiles();
        if (r1 - r0 > kAmxRows) {
          multiply_pair<2>(ldg / kAmxDepth, dgates + r0 * ldg, ldg, w, [] {});
          store_pair<2>(dh, 32);
        } else {
          multiply_pair<1>(ldg / kAmxDepth, dgates + r0 * ldg, ldg, w, [] {});
          store_pair<1>(dh, 32);
        }
        for (int64_t r = r0; r < r1; ++r) {
          const bool fresh = a.rows.fresh_at(t, r);
          float* to = a.dh + r * ld + n0;
          store(to, fresh ? V{} : load(dh + (r - r0) * 32));
          store(to + 16, fresh ? V{} : load(dh + (r - r0) * 32 + 16));
        }
      }
  }
}

}  // namespace fastlstm::amx
