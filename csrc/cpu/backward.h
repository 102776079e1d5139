// Backward of one direction over the whole sequence: per step the cell's gradients, then dh_{t-1} = dgates
// W_hh. dx, dW and db are products over all rows after the loop and are not made here.
#pragma once

#include "cpu/forward.h"

namespace fastlstm::FASTLSTM_ISA {

template <class T>
int64_t padded_columns(int64_t N) {
  return (N + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
}

template <class T>
int64_t columns_packed_size(int64_t K, int64_t N) {
  return padded_columns<T>(N) * K;
}

template <class T, class S>
void pack_columns(const T* b, int64_t K, int64_t row_stride, int64_t column_stride, int64_t begin,
                  int64_t end, S* packed) {
  constexpr int64_t W2 = kPanel<T>;
  for (int64_t n0 = begin; n0 < end; n0 += W2) {
    const int64_t n = std::min(W2, end - n0);
    S* panel = packed + n0 * K;
    for (int64_t k = 0; k < K; ++k)
      copy_panel_row(b + k * row_stride + n0 * column_stride, column_stride, n, panel + k * W2);
  }
}

template <class T>
int64_t backward_scratch(int64_t H, int64_t P) {
  return P == H
             ? 0
             : kRowBlockRows * padded_columns<T>(H);  // gradients of h before the projection, for a row group
}

// c[rows, columns n_begin..n_end) = a[rows, K] times packed panels, from the last to the first if
// `reverse_blocks`; c has room for whole panels.
template <class T, class S>
void product_packed(int64_t rows, int64_t K, const T* a, int64_t lda, const S* packed, int64_t n_begin,
                    int64_t n_end, T* c, int64_t ldc, bool reverse_blocks = false) {
  constexpr int64_t W2 = kPanel<T>;
  const int64_t step = rows <= kWideRows ? 2 * W2 : W2, parts = (n_end - n_begin + step - 1) / step;
  for (int64_t k = 0; k < parts; ++k) {
    int64_t n = n_begin + (reverse_blocks ? parts - 1 - k : k) * step;
    const int64_t end = std::min(n_end, n + step);
    if (end - n == 2 * W2) {
      wide_product(rows, K, a, lda, packed + n * K, c + n, ldc, false);
      continue;
    }
    for (; n < end; n += W2) {
      if (end - n <= kWidth<T>)
        half_panel_product(rows, K, a, lda, packed + n * K, c + n, ldc);
      else
        panel_product(rows, K, a, lda, packed + n * K, c + n, ldc, false,
                      reverse_blocks && n > n_begin ? packed + (n - W2) * K : nullptr);
    }
  }
}

// The same from B [K, N] as stored, for so few rows and steps that packing would not pay.
template <class T, class S>
void product_direct(int64_t rows, int64_t K, const T* a, int64_t lda, const S* b, int64_t N, int64_t n_begin,
                    int64_t n_end, T* c, int64_t ldc) {
  constexpr int64_t W = kWidth<T>;
  int64_t n = n_begin;
  for (int64_t k = 0; k < K; k += kDepth) {  // for the TLB, as in small_product_of
    const int64_t depth = std::min(kDepth, K - k);
    const S* rows_of_b = b + k * N;
    n = n_begin;
    for (; rows == 1 && n + 8 * W <= n_end; n += 8 * W)
      tile<T, 1, 8>(depth, a + k, lda, rows_of_b + n, N, c + n, ldc, k > 0);
    for (; n + 4 * W <= n_end; n += 4 * W)
      for_row_tiles(rows, kWideRows, [&](int64_t r, int M) {
        tile_rows<T, 4, false, kWideRows>(M, depth, a + r * lda + k, lda, rows_of_b + n, N, c + r * ldc + n,
                                          ldc, k > 0);
      });
  }
  for (; n < n_end; n += W) {
    const int part = static_cast<int>(std::min<int64_t>(W, n_end - n));
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> acc[4] = {};                      // four sums, since each addition waits for the one before
      for (int64_t k = 0; k + 4 <= K; k += 4)  // K = 4H
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) acc[q] += a[r * lda + k + q] * load_part(b + (k + q) * N + n, part);
      store_part(c + r * ldc + n, (acc[0] + acc[1]) + (acc[2] + acc[3]), part);
    }
  }
}

// c [H] that entered a row's step: of the step before, or c0; neither where it began with zeros.
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

// The cell's gradients for units [u0, u0 + n) of sorted row r at step t; dh points at the gradient of h_t
// before any projection, without dy unless `dy` is null.
template <class T, class S>
FASTLSTM_INLINE void cell_gradients(const BackwardArgs<T, S>& a, int64_t t, int64_t r, int64_t row,
                                    const EnteringCell<T>& c_enter, const Real<T>* dh, const T* dy,
                                    int64_t u0, int n) {
  const int64_t H = a.H;
  const bool full = n == kWidth<T>;
  auto get = [&](const auto* p) { return full ? load(p) : load_part(p, n); };
  auto put = [&](Real<T>* p, Vec<T> v) { full ? store(p, v) : store_part(p, v, n); };
  const int64_t packed_row = a.rows.offset_at(t) + r;
  const T* g = a.gates + packed_row * 4 * H + 4 * u0;
  Real<T>* dg = a.dgates + (packed_row - a.base) * 4 * H + u0;
  Real<T>* dc_state = a.dc + r * H + u0;
  Vec<T> dh_t = get(dh + u0);
  if (dy) dh_t += get(dy + u0);
  if (a.masks.zoneout_h && !a.w_hr) dh_t -= keep_gradient(a, t, r, u0, n, dh_t);
  Vec<T> dc = get(dc_state);
  if (a.dcells) dc += get(a.dcells + row * a.dcells_stride + u0);
  const Vec<T> c_prev = c_enter.cells ? get(c_enter.cells + u0)
                        : c_enter.c0  ? get(c_enter.c0 + u0)
                                      : Vec<T>{};
  const Gates<Vec<T>> gate = {get(g), get(g + n), get(g + 2 * n), get(g + 3 * n)};
  Vec<T> kept_c = {}, c;
  if (a.masks.zoneout_c) {  // h was computed from c before its zoneout
    kept_c = dc * load_mask<T>(a.masks.zoneout_c, t, a.rows.batch_row_at(r), u0, n);
    dc -= kept_c;
    c = next_c(gate, c_prev);
  } else {
    c = get(a.cells + row * a.cells_stride + u0);
  }
  const Vec<T> tanh_c = Activation<T>::tanh(c);
  const Gates<Vec<T>> d = cell_backward(gate, c_prev, tanh_c, dh_t, dc);
  dc += kept_c;
  put(dg, d.i);
  put(dg + H, d.f);
  put(dg + 2 * H, d.g);
  put(dg + 3 * H, d.o);
  put(dc_state, c_enter.cells || c_enter.c0 ? dc : Vec<T>{});
  if (a.hidden) put(a.hidden + (packed_row - a.base) * H + u0, gate.o * tanh_c);
}

template <class T, class S>
void backward(const BackwardArgs<T, S>& a, const Member& me) {
  constexpr int64_t W = kWidth<T>;
  const int64_t steps = a.rows.T, H = a.H, P = a.P, ld = padded_columns<T>(P);
  Real<T>* dhidden = a.scratch + me.index * backward_scratch<T>(H, P);  // [kRowBlockRows, padded H]
  const int64_t ld_hidden = padded_columns<T>(H);
  for (int64_t s = a.first + a.steps - 1; s >= a.first; --s) {
    const int64_t t = a.reverse ? steps - 1 - s : s;
    const int64_t before =
        s == 0 ? -1 : (a.reverse ? t + 1 : t - 1);  // the step whose state entered this one
    const int64_t held =
        before < 0 ? 0 : a.rows.count_at(before);  // rows that have it; the others began here
    const int64_t offset = a.rows.offset_at(t) - a.base;
    const int64_t end = std::min(me.row_end, a.rows.count_at(t));
    const int64_t own = std::max<int64_t>(0, end - me.row_begin);
    // The columns of h that a member owns: without projection those of its units.
    const int64_t n_begin = me.feature_begin, n_end = me.feature_end;
    if (a.w_hr) {
      for (int64_t r = me.row_begin; r < me.row_begin + own; ++r) {
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
      if (me.barrier) me.barrier->wait();
    }
    for_row_tiles(own, kRowBlockRows, [&](int64_t first, int64_t count) {
      const int64_t r0 = me.row_begin + first, r1 = r0 + count;
      if (a.w_hr)
        product_packed(count, P, a.dr + (offset + r0) * P, P, a.w_hr, me.unit_begin, me.unit_end, dhidden,
                       ld_hidden);
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t row = a.rows.row_at(t, r);
        EnteringCell<T> c_enter = {};
        if (!a.rows.fresh_at(t, r) && r < held)
          c_enter.cells = a.cells + a.rows.row_at(before, r) * a.cells_stride;
        else if (!a.rows.fresh_at(t, r))
          c_enter.c0 = a.c0 + r * H;
        const Real<T>* dh = a.w_hr ? dhidden + (r - r0) * ld_hidden : a.dh + r * ld;
        const T* dy = a.w_hr || !a.dy ? nullptr : a.dy + row * a.dy_stride;
        int64_t u = me.unit_begin;
        for (; u + W <= me.unit_end; u += W) cell_gradients(a, t, r, row, c_enter, dh, dy, u, W);
        if (u < me.unit_end)
          cell_gradients(a, t, r, row, c_enter, dh, dy, u, static_cast<int>(me.unit_end - u));
      }
    });
    if (me.barrier) me.barrier->wait();
    const bool reverse_blocks = s % 2 == 1 && alternate_block_order(4.0 * H * (n_end - n_begin) * sizeof(S));
    for_row_tiles(own, kRowBlockRows, [&](int64_t first, int64_t rows) {
      const int64_t r0 = me.row_begin + first;
      const Real<T>* dg = a.dgates + (offset + r0) * 4 * H;
      if (a.packed)
        product_packed(rows, 4 * H, dg, 4 * H, a.packed, n_begin, n_end, a.dh + r0 * ld, ld, reverse_blocks);
      else
        product_direct(rows, 4 * H, dg, 4 * H, a.w_hh, P, n_begin, n_end, a.dh + r0 * ld, ld);
      if (a.masks.recurrent || a.masks.zoneout_h)
        for (int64_t r = r0; r < r0 + rows; ++r)
          for (int64_t p = n_begin; p < n_end; p += W) {
            const int n = static_cast<int>(std::min<int64_t>(W, n_end - p));
            Vec<T> dh = load_part(a.dh + r * ld + p, n);
            if (a.masks.recurrent) dh *= load_mask<T>(a.masks.recurrent, t, a.rows.batch_row_at(r), p, n);
            if (a.masks.zoneout_h) dh += load_part(a.kept_h + r * ld + p, n);
            store_part(a.dh + r * ld + p, dh, n);
          }
      for (int64_t r = r0; r < r0 + rows; ++r)
        if (a.rows.fresh_at(t, r)) std::fill(a.dh + r * ld + n_begin, a.dh + r * ld + n_end, Real<T>(0));
    });
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
