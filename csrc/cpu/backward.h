// Backward of one direction over the whole sequence: per step the cell's gradients, then dh_{t-1} = dgates
// W_hh. dx, dW and db are products over all rows after the loop and are not made here.
#pragma once

#include "cpu/columns.h"
#include "cpu/forward.h"

namespace fastlstm::FASTLSTM_ISA {

template <class T>
int64_t backward_scratch(int64_t H, int64_t P) {
  return P == H
             ? 0
             : kRowBlockRows * padded_columns<T>(H);  // gradients of h before the projection, for a row group
}

// c [H] that entered a row's step: of the previous step, or c0; neither where it began with zeros.
template <class T>
struct EnteringCell {
  const T* cells;
  const Real<T>* c0;
};

// The part of dh, the gradient of h_t's features [p, p + n), that a zoneout passes to h_{t-1}; kept for it.
template <class T, class S>
FASTLSTM_INLINE Vec<T> keep_gradient(const BackwardArgs<T, S>& a, int64_t t, int64_t r, int64_t p, int n,
                                     Vec<T> dh) {
  const Vec<T> kept = dh * load_mask<T>(a.masks.zoneout_h, t, a.rows.batch_row_at(r), p, n);
  store_part(a.kept_h + r * padded_columns<T>(a.P) + p, kept, n);
  return kept;
}

// What a step's gradients of the cell are computed from, of sorted row r: of units [u, u + n), n <= W.
template <class T, class S>
struct CellRow {
  const BackwardArgs<T, S>& a;
  int64_t t, r, row;  // row: the caller's
  EnteringCell<T> c_enter;
  const Real<T>* dh;  // of h_t before any projection, without dy
  const T* dy;        // or null

  template <class E>
  static FASTLSTM_INLINE Vec<T> get(const E* p, int n) {
    return n == kWidth<T> ? load(p) : load_part(p, n);
  }
  static FASTLSTM_INLINE void put(Real<T>* p, Vec<T> v, int n) {
    n == kWidth<T> ? store(p, v) : store_part(p, v, n);
  }
  int64_t packed_row() const { return a.rows.offset_at(t) + r; }
  bool begins() const { return !c_enter.cells && !c_enter.c0; }  // from zeros

  FASTLSTM_INLINE Gates<Vec<T>> gates(int64_t u, int n) const {
    const T* g = a.gates + packed_row() * 4 * a.H + 4 * u;
    return {get(g, n), get(g + n, n), get(g + 2 * n, n), get(g + 3 * n, n)};
  }
  FASTLSTM_INLINE Vec<T> c_prev(int64_t u, int n) const {
    return c_enter.cells ? get(c_enter.cells + u, n) : c_enter.c0 ? get(c_enter.c0 + u, n) : Vec<T>{};
  }
  // What h was computed from: c before its zoneout.
  FASTLSTM_INLINE Vec<T> c(int64_t u, int n, const Gates<Vec<T>>& gate, Vec<T> c_prev) const {
    return a.masks.zoneout_c ? next_c(gate, c_prev) : get(a.cells + row * a.cells_stride + u, n);
  }
  // The gradient of h_t before its zoneout.
  FASTLSTM_INLINE Vec<T> arriving_dh(int64_t u, int n) const {
    Vec<T> v = get(dh + u, n);
    if (dy) v += get(dy + u, n);
    if (a.masks.zoneout_h && !a.w_hr) v -= keep_gradient(a, t, r, u, n, v);
    return v;
  }
  // That of c_t before its zoneout by every way but h_t; `kept`: what the zoneout passes to c_{t-1}.
  FASTLSTM_INLINE Vec<T> arriving_dc(int64_t u, int n, Vec<T>& kept) const {
    Vec<T> v = get(a.dc + r * a.H + u, n);
    if (a.dcells) v += get(a.dcells + row * a.dcells_stride + u, n);
    kept = Vec<T>{};
    if (a.masks.zoneout_c) {
      kept = v * load_mask<T>(a.masks.zoneout_c, t, a.rows.batch_row_at(r), u, n);
      v -= kept;
    }
    return v;
  }
  // dc_prev: the gradient of c_{t-1}.
  FASTLSTM_INLINE void store_dc(int64_t u, int n, Vec<T> dc_prev) const {
    put(a.dc + r * a.H + u, begins() ? Vec<T>{} : dc_prev, n);
  }
  // The gradients of these units' pre-activations into a row dg [4H].
  FASTLSTM_INLINE void store_gates(int64_t u, int n, const Gates<Vec<T>>& d, Real<T>* dg) const {
    put(dg + u, d.i, n);
    put(dg + a.H + u, d.f, n);
    put(dg + 2 * a.H + u, d.g, n);
    put(dg + 3 * a.H + u, d.o, n);
  }
  FASTLSTM_INLINE void store_hidden(int64_t u, int n, Vec<T> h) const {
    if (a.hidden) put(a.hidden + (packed_row() - a.base) * a.H + u, h, n);
  }
};

template <class T, class S>
FASTLSTM_INLINE void cell_gradients(const CellRow<T, S>& cell, int64_t u, int n) {
  const BackwardArgs<T, S>& a = cell.a;
  const Vec<T> dh = cell.arriving_dh(u, n), c_prev = cell.c_prev(u, n);
  Vec<T> kept, dc = cell.arriving_dc(u, n, kept);
  const Gates<Vec<T>> gate = cell.gates(u, n);
  const Vec<T> tanh_c = Activation<T>::tanh(cell.c(u, n, gate, c_prev));
  const Gates<Vec<T>> d = cell_backward(gate, c_prev, tanh_c, dh, dc);
  cell.store_gates(u, n, d, a.dgates + (cell.packed_row() - a.base) * 4 * a.H);
  cell.store_dc(u, n, dc + kept);
  cell.store_hidden(u, n, gate.o * tanh_c);
}

// A step of the direction's order, of one member.
template <class T, class S>
struct BackwardStep {
  const BackwardArgs<T, S>& a;
  const Member& me;
  int64_t s, t;    // in the direction's order, in time
  int64_t offset;  // of the step's rows in dgates, dr and hidden
  int64_t rows;    // of the member

  BackwardStep(const BackwardArgs<T, S>& a, const Member& me, int64_t s)
      : a(a),
        me(me),
        s(s),
        t(a.reverse ? a.rows.T - 1 - s : s),
        offset(a.rows.offset_at(t) - a.base),
        rows(std::max<int64_t>(0, std::min(me.row_end, a.rows.count_at(t)) - me.row_begin)) {}

  // With projection: the gradients of h, of the member's features.
  void projected_gradients() const {
    constexpr int64_t W = kWidth<T>;
    const int64_t P = a.P, ld = padded_columns<T>(P), n_begin = me.feature_begin, n_end = me.feature_end;
    for (int64_t r = me.row_begin; r < me.row_begin + rows; ++r) {
      Real<T>* dr = a.dr + (offset + r) * P;
      std::copy(a.dh + r * ld + n_begin, a.dh + r * ld + n_end, dr + n_begin);
      if (a.dy) {
        const T* dy = a.dy + a.rows.row_at(t, r) * a.dy_stride;
        for (int64_t p = n_begin; p < n_end; ++p) dr[p] += real(dy[p]);
      }
      for (int64_t p = n_begin; a.masks.zoneout_h && p < n_end; p += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, n_end - p));
        const Vec<T> dh = load_part(dr + p, n);
        store_part(dr + p, dh - keep_gradient(a, t, r, p, n, dh), n);
      }
    }
  }

  // The member's rows of h before the projection, its units, from row r0 on: their gradients.
  void hidden_gradients(int64_t r0, int64_t count, Real<T>* dhidden) const {
    product_packed(count, a.P, a.dr + (offset + r0) * a.P, a.P, a.w_hr, me.unit_begin, me.unit_end, dhidden,
                   padded_columns<T>(a.H));
  }

  // dhidden: of rows from r0 on, with projection.
  CellRow<T, S> cell(int64_t r, int64_t r0, const Real<T>* dhidden) const {
    const int64_t row = a.rows.row_at(t, r);
    const int64_t previous = a.rows.previous_row(a.reverse, t, r);
    EnteringCell<T> c_enter = {};
    if (previous >= 0)
      c_enter.cells = a.cells + previous * a.cells_stride;
    else if (previous == Rows::kInitialState)
      c_enter.c0 = a.c0 + r * a.H;
    return {a,
            t,
            r,
            row,
            c_enter,
            a.w_hr ? dhidden + (r - r0) * padded_columns<T>(a.H) : a.dh + r * padded_columns<T>(a.P),
            a.w_hr || !a.dy ? nullptr : a.dy + row * a.dy_stride};
  }

  // dh_{t-1} of `count` rows from r0 on, the member's features. dg: gradients of W_hh h [., 4H], of the rows
  // of the chunk.
  void previous_gradients(int64_t r0, int64_t count, const Real<T>* dg) const {
    constexpr int64_t W = kWidth<T>;
    const int64_t G = 4 * a.H, ld = padded_columns<T>(a.P), n_begin = me.feature_begin,
                  n_end = me.feature_end;
    const bool reverse_blocks =
        s % 2 == 1 && alternate_block_order(double(G) * (n_end - n_begin) * sizeof(S));
    const Real<T>* rows_of_dg = dg + (offset + r0) * G;
    if (a.packed)
      product_packed(count, G, rows_of_dg, G, a.packed, n_begin, n_end, a.dh + r0 * ld, ld, reverse_blocks);
    else
      product_direct(count, G, rows_of_dg, G, a.w_hh, a.P, n_begin, n_end, a.dh + r0 * ld, ld);
    if (a.masks.recurrent || a.masks.zoneout_h)
      for (int64_t r = r0; r < r0 + count; ++r)
        for (int64_t p = n_begin; p < n_end; p += W) {
          const int n = static_cast<int>(std::min<int64_t>(W, n_end - p));
          Vec<T> dh = load_part(a.dh + r * ld + p, n);
          if (a.masks.recurrent) dh *= load_mask<T>(a.masks.recurrent, t, a.rows.batch_row_at(r), p, n);
          if (a.masks.zoneout_h) dh += load_part(a.kept_h + r * ld + p, n);
          store_part(a.dh + r * ld + p, dh, n);
        }
    for (int64_t r = r0; r < r0 + count; ++r)
      if (a.rows.fresh_at(t, r)) std::fill(a.dh + r * ld + n_begin, a.dh + r * ld + n_end, Real<T>(0));
  }
};

template <class T, class S>
void backward(const BackwardArgs<T, S>& a, const Member& me) {
  constexpr int64_t W = kWidth<T>;
  Real<T>* dhidden = a.scratch + me.index * backward_scratch<T>(a.H, a.P);  // [kRowBlockRows, padded H]
  for (int64_t s = a.first + a.steps - 1; s >= a.first; --s) {
    const BackwardStep<T, S> step(a, me, s);
    if (a.w_hr) {
      step.projected_gradients();
      if (me.barrier) me.barrier->wait();
    }
    for_row_tiles(step.rows, kRowBlockRows, [&](int64_t first, int64_t count) {
      const int64_t r0 = me.row_begin + first;
      if (a.w_hr) step.hidden_gradients(r0, count, dhidden);
      for (int64_t r = r0; r < r0 + count; ++r) {
        const CellRow<T, S> cell = step.cell(r, r0, dhidden);
        int64_t u = me.unit_begin;
        for (; u + W <= me.unit_end; u += W) cell_gradients(cell, u, W);
        if (u < me.unit_end) cell_gradients(cell, u, static_cast<int>(me.unit_end - u));
      }
    });
    if (me.barrier) me.barrier->wait();
    for_row_tiles(step.rows, kRowBlockRows, [&](int64_t first, int64_t count) {
      step.previous_gradients(me.row_begin + first, count, a.dgates);
    });
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
