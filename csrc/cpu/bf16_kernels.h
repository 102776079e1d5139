// Forward and backward of a layer on the products of cpu/bf16_tiles_*.h, of which the includer has chosen
// one.
#pragma once

#include "cpu/bf16_numbers.h"

namespace fastlstm::FASTLSTM_ISA {

// The cell for units [u0, u0 + n) of sorted row r at step t, from the products pre [4][16].
template <class T>
FASTLSTM_INLINE void forward_cell(const ForwardArgs<T>& a, int64_t t, int64_t next_t, int64_t r, int64_t u0,
                                  int n, const V* bias, const float* pre, int64_t slot) {
  const int64_t H = a.H, row = a.rows.row_at(t, r);
  const Gates<V> gate = activate<FastActivation>(Gates<V>{
      load(pre) + bias[0], load(pre + 16) + bias[1], load(pre + 32) + bias[2], load(pre + 48) + bias[3]});
  float* c = a.c + r * H + u0;
  const V c_prev = a.rows.fresh_at(t, r) ? V{} : load_part(c, n);
  const V c_next = next_c(gate, c_prev);
  const V h = gate.o * FastActivation::tanh(c_next);
  if (a.gates) {
    T* saved = a.gates + (a.rows.offset_at(t) + r) * 4 * H + 4 * u0;
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
  const V h_next = cleared ? V{} : h;
  put(a.h + (slot * bf16::factor_rows(a.rows.B) + r) * row_stride(H) + u0, h_next, n);
  if constexpr (!std::is_same_v<T, Bf16>) put(a.h_state + (slot * a.rows.B + r) * H + u0, h_next, n);
}

// Rows [r, end) of units [u0, u0 + n) whose products are made and whose cells are not.
template <class T>
struct PendingCells {
  const ForwardArgs<T>& a;
  int64_t t, next_t;
  int64_t slot;  // of h that they write
  int64_t r = 0, end = 0, u0 = 0;
  int n = 0;
  V bias[4] = {};
  const float* pre = nullptr;  // of row r

  __attribute__((noinline)) void one() {
    if (n == kBlock)
      forward_cell(a, t, next_t, r, u0, kBlock, bias, pre, slot);
    else
      forward_cell(a, t, next_t, r, u0, n, bias, pre, slot);
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

template <class T>
void forward(const ForwardArgs<T>& a, const Member& me) {
  const ProductScope scope;
  const int64_t steps = a.rows.T, B = a.rows.B, H = a.H, I = a.I, ldx = row_stride(I), ldh = row_stride(H);
  Bf16* x = a.scratch + me.index * bf16::forward_scratch(I);
  std::fill_n(x, bf16::forward_scratch(I), Bf16(0));  // the padding of a row is multiplied by zeros
  const int64_t blocks = (me.unit_end - me.unit_begin + kBlock - 1) / kBlock;
  alignas(64) float buffers[2][2 * kTileRows * 64];
  int buffer = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = a.reverse ? steps - 1 - s : s;
    const int64_t next_t = s + 1 == steps ? -1 : (a.reverse ? t - 1 : t + 1);
    const int64_t end = std::min(me.row_end, a.rows.count_at(t));
    const Bf16* h_in = a.h + (s % 2) * bf16::factor_rows(B) * ldh;
    PendingCells<T> pending{a, t, next_t, (s + 1) % 2};
    const bool reverse_blocks =
        s % 2 == 1 && alternate_block_order(8.0 * (I + H) * (me.unit_end - me.unit_begin));
    for (int64_t g0 = me.row_begin; g0 < end; g0 += kBf16RowBlockRows) {
      const int64_t g1 = std::min(end, g0 + kBf16RowBlockRows);
      for (int64_t r = g0; r < g1; ++r) round_row(a.x + a.rows.row_at(t, r) * I, I, x + (r - g0) * ldx);
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t u0 = me.unit_begin + (reverse_blocks ? blocks - 1 - k : k) * kBlock;
        for (int64_t r0 = g0; r0 < g1; r0 += 2 * kTileRows) {
          const int64_t r1 = std::min(g1, r0 + 2 * kTileRows);
          float* pre = buffers[buffer ^= 1];
          const auto between = [&] { pending.next(); };
          // Tiles read up to 15 rows past the last; the results are discarded.
          gate_products(a, r1 - r0, x + (r0 - g0) * ldx, h_in + r0 * ldh, u0, pre, between);
          pending.finish();
          pending.r = r0;
          pending.end = r1;
          pending.u0 = u0;
          pending.n = static_cast<int>(std::min(kBlock, H - u0));
          for (int64_t gate = 0; gate < 4; ++gate)
            pending.bias[gate] = load_part(a.bias + gate * H + u0, pending.n);
          pending.pre = pre;
        }
      }
    }
    pending.finish();
    if (me.barrier) me.barrier->wait();
  }
}

// The cell's gradients for units [u0, u0 + n) of sorted row r at step t.
template <class T>
FASTLSTM_INLINE void backward_cell(const BackwardArgs<T>& a, int64_t t, int64_t r, int64_t before,
                                   int64_t held, int64_t u0, int n, float* db) {
  const int64_t H = a.H, row = a.rows.row_at(t, r);
  const int64_t packed_row = a.rows.offset_at(t) + r;
  const T* g = a.gates + packed_row * 4 * H + 4 * u0;
  if (r < held) {  // what the next step reads: too little at a time for the hardware to foresee
    const T* next = a.gates + (a.rows.offset_at(before) + r) * 4 * H + 4 * u0;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t k = 0; k < 4 * kBlock; k += kLine) __builtin_prefetch(next + k);
  }
  V dh = load_part(a.dh + r * padded(H) + u0, n);
  if (a.dy) dh += get(a.dy + row * a.dy_stride + u0, n);
  V dc = load_part(a.dc + r * H + u0, n);
  if (a.dcells) dc += get(a.dcells + row * a.dcells_stride + u0, n);
  const bool fresh = a.rows.fresh_at(t, r);
  const V c_prev = fresh      ? V{}
                   : r < held ? get(a.cells + a.rows.row_at(before, r) * a.cells_stride + u0, n)
                              : load_part(a.c0 + r * H + u0, n);
  const V tanh_c = FastActivation::tanh(get(a.cells + row * a.cells_stride + u0, n));
  const Gates<V> gate = {get(g, n), get(g + n, n), get(g + 2 * n, n), get(g + 3 * n, n)};
  const Gates<V> d = cell_backward(gate, c_prev, tanh_c, dh, dc);
  const auto sum = [&](float* to, V v) { store_part(to, load_part(to, n) + v, n); };
  sum(db + u0, d.i);
  sum(db + H + u0, d.f);
  sum(db + 2 * H + u0, d.g);
  sum(db + 3 * H + u0, d.o);
  Bf16* out = a.dgates + (packed_row - a.base) * row_stride(4 * H) + u0;
  put(out, d.i, n);
  put(out + H, d.f, n);
  put(out + 2 * H, d.g, n);
  put(out + 3 * H, d.o, n);
  store_part(a.dc + r * H + u0, fresh ? V{} : dc, n);
}

// The rows of some units of one step whose dh is made and whose cells are not.
template <class T>
struct PendingGradients {
  const BackwardArgs<T>& a;
  float* db;
  int64_t t = 0, before = -1, held = 0;  // the step, the one before it, rows that has
  int64_t unit_begin = 0, unit_end = 0;
  int64_t r = 0, end = 0, u0 = 0;  // the next cell is of row r < end and unit u0

  void at_step(int64_t s) {
    t = a.reverse ? a.rows.T - 1 - s : s;
    before = s == 0 ? -1 : (a.reverse ? t + 1 : t - 1);
    held = before < 0 ? 0 : a.rows.count_at(before);
  }
  void set(int64_t first_unit, int64_t last_unit, int64_t first_row, int64_t last_row) {
    u0 = unit_begin = first_unit;
    unit_end = last_unit;
    r = first_row;
    end = last_row;
  }
  __attribute__((noinline)) void one() {
    if (u0 + kBlock <= unit_end)
      backward_cell(a, t, r, before, held, u0, kBlock, db);
    else
      backward_cell(a, t, r, before, held, u0, static_cast<int>(unit_end - u0), db);
    u0 += kBlock;
    if (u0 < unit_end) return;
    u0 = unit_begin;
    ++r;
  }
  FASTLSTM_INLINE void next() {
    if (r < end) one();
  }
  void finish() {
    while (r < end) one();
  }
};

template <class T>
void backward(const BackwardArgs<T>& a, const Member& me) {
  const ProductScope scope;
  const int64_t H = a.H, ld = padded(H), ldg = row_stride(4 * H);
  const int64_t next = padded(4 * H) * kUnits;  // from the weights of 32 columns to the next
  alignas(64) float dh[2 * kTileRows * 64];
  const auto rows_at = [&](int64_t t) { return std::min(me.row_end, a.rows.count_at(t)); };
  // The cells of a step run between the products of the one after it, as soon as those have made their dh.
  PendingGradients<T> pending{a, a.db + me.index * 4 * H};
  pending.at_step(a.first + a.steps - 1);
  pending.set(me.unit_begin, me.unit_end, me.row_begin, rows_at(pending.t));
  pending.finish();
  for (int64_t s = a.first + a.steps - 1; s >= a.first; --s) {
    if (me.barrier) me.barrier->wait();
    const int64_t t = pending.t, end = rows_at(t), rows = end - me.row_begin;
    if (s > a.first) pending.at_step(s - 1);
    const int64_t pending_end = s > a.first ? rows_at(pending.t) : 0;
    const Bf16* dgates = a.dgates + (a.rows.offset_at(t) - a.base) * ldg;
    const int64_t step = (wide_columns(rows) ? 2 : 1) * kUnits, units = me.unit_end - me.unit_begin;
    const int64_t parts = (units + step - 1) / step;
    const bool reverse_blocks = s % 2 == 1 && alternate_block_order(8.0 * H * units);
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t n0 = me.unit_begin + (reverse_blocks ? parts - 1 - k : k) * step;
      const bool wide = step > kUnits && n0 + kUnits < me.unit_end;
      const int64_t n1 = std::min(me.unit_end, n0 + step);
      const Bf16* w = a.w_hh + n0 / kUnits * next;
      for (int64_t r0 = me.row_begin; r0 < end; r0 += 2 * kTileRows) {
        const int64_t r1 = std::min(end, r0 + 2 * kTileRows);
        column_products(r1 - r0, 4 * H, dgates + r0 * ldg, ldg, w, next, wide, dh, [&] { pending.next(); });
        for (int64_t r = r0; r < r1; ++r) {
          const bool fresh = a.rows.fresh_at(t, r);
          const float* from = dh + (r - r0) * 64;
          float* to = a.dh + r * ld + n0;
          for (int64_t j = 0; j < (wide ? 64 : 32); j += 16) store(to + j, fresh ? V{} : load(from + j));
        }
      }
      pending.finish();
      pending.set(n0, n1, me.row_begin, pending_end);
    }
    pending.finish();
  }
}

template <class T>
inline constexpr bf16::Kernels<T> kTable = {FASTLSTM_BF16_NAME, pack_gates<T>, pack_columns<T>,
                                            forward<T>,         backward<T>,   gemm};

}  // namespace fastlstm::FASTLSTM_ISA
