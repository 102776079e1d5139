// Forward of one direction over the whole sequence: per step x W_ih^T + h W_hh^T, then the cell while the
// tile is in L1.
#pragma once

#include "cpu/direct.h"
#include "cpu/gemm.h"
#include "cpu/hoist.h"
#include "cpu/mask_vectors.h"
#include "cpu/pack_forward.h"
#include "cpu/sequence.h"

namespace fastlstm::FASTLSTM_ISA {

// Of a row of projected h: features in panels, and what a product of four vectors adds to the last.
template <class T>
int64_t projected_stride(int64_t P) {
  return (P / kPanel<T> + 2) * kPanel<T>;
}

// A member's scratch: pre-activations of a row group or of some steps, the rows of x they are made of, a
// block of both weights, with projection its result for a row group, and rows of x and h for weights read as
// stored.
template <class T>
struct ForwardScratch {
  int64_t x, block, projected, split, size;
  ForwardScratch(int64_t N, int64_t I, int64_t H, int64_t P)
      : x(std::max(kRowBlockRows, hoist_rows(N) * unit_blocks<T>(H)) * kGateBlock<T>),
        block(x + hoist_rows(N) * I),
        projected(block + (I + P) * kGateBlock<T>),
        split(projected + (P == H ? 0 : kRowBlockRows * projected_stride<T>(P))),
        size(split + (Factors<T>::split ? kUnpackedMaxRows * (split_stride<T>(I) + split_stride<T>(P)) : 0)) {
  }
};

// Rows v [rows, K] as Factors has them; into `to` where that is another order.
template <class T>
FASTLSTM_INLINE const Real<T>* factor_rows(const Real<T>* v, int64_t rows, int64_t K, Real<T>* to) {
  if constexpr (!Factors<T>::split) return v;
  split_rows<T>(v, rows, K, to);
  return to;
}

template <class T>
int64_t forward_scratch(int64_t N, int64_t I, int64_t H, int64_t P) {
  return ForwardScratch<T>(N, I, H, P).size;
}

// The packed weights [., K] of the unit block at u, for which `scratch` is the place if they are not packed
// yet.
template <class T, class S>
FASTLSTM_INLINE const S* packed_block(const GateWeight<T, S>& w, int64_t H, int64_t K, int64_t u,
                                      Real<T>* scratch) {
  if (w.mode == WeightMode::prepacked) return w.packed + u / kWidth<T> * K * kGateBlock<T>;
  S* block = reinterpret_cast<S*>(scratch);
  pack_block(w.stored, H, K, u, block);
  return block;
}

// out [rows][4 gates][gap], rows kGateBlock apart, (+)= a [rows, K] times the packed weights of one unit
// block, after which `next` is read.
template <class T, class S>
FASTLSTM_INLINE void block_product(int64_t rows, int64_t K, const T* a, int64_t lda, const S* block,
                                   int64_t gap, T* out, bool add, const S* next = nullptr) {
  constexpr int64_t ld = kGateBlock<T>, W = kWidth<T>, W2 = kPanel<T>;
  if (4 * gap <= W) return half_panel_product(rows, K, a, lda, block, out, ld, add);
  if (gap < W) {
    panel_product(rows, K, a, lda, block, out, ld, add);
    if (4 * gap > W2) half_panel_product(rows, K, a, lda, block + K * W2, out + W2, ld, add);
    return;
  }
  if (rows <= kWideRows) return wide_product(rows, K, a, lda, block, out, ld, add);
  panel_product(rows, K, a, lda, block, out, ld, add);                      // i, f
  panel_product(rows, K, a, lda, block + K * W2, out + W2, ld, add, next);  // g, o
}

template <class T, class S>
struct ForwardStep {
  using R = Real<T>;
  const ForwardArgs<T, S>& a;
  int64_t t;                     // time
  const R* x;                    // [count, I]
  const R* h_in;                 // [B, P]
  const R* c_in;                 // [B, H]
  R* h_out;                      // [B, P]
  T* gates;                      // [count, 4H] or null
  int64_t next_t;                // the step after this one in the direction's order, or -1
  R* block;                      // both weights of a unit block, where they are packed for one use
  const R *x_factor, *h_factor;  // x and h_in from row first_row on, where the weights are read as stored
  int64_t first_row;
  const bool masked = bool(a.masks);  // asked once, not for each vector

  // Whether sorted row r enters the next step with zero state.
  bool cleared_next(int64_t r) const {
    return a.rows.fresh && next_t >= 0 && r < a.rows.count_at(next_t) && a.rows.fresh_at(next_t, r);
  }

  // h, features [p, p + n) of sorted row r, as it enters the product of the next step.
  FASTLSTM_INLINE Vec<T> entering_next(Vec<T> h, int64_t r, int64_t p, int n) const {
    if (cleared_next(r)) return Vec<T>{};
    const Vec<T> state = rounded<T>(h);
    if (!masked || !a.masks.recurrent || next_t < 0) return state;
    return state * load_mask<T>(a.masks.recurrent, next_t, a.rows.batch_row_at(r), p, n);
  }

  // h after the zoneout of these features.
  FASTLSTM_INLINE Vec<T> zoned_h(Vec<T> h, int64_t r, int64_t p, int n) const {
    if (!masked || !a.masks.zoneout_h) return h;
    const int64_t previous = a.rows.previous_row(a.reverse, t, r);
    const Vec<T> h_prev = previous == Rows::kZeroState      ? Vec<T>{}
                          : previous == Rows::kInitialState ? load_part(a.h0 + r * a.P + p, n)
                                                            : load_part(a.y + previous * a.y_stride + p, n);
    const Vec<T> share = load_mask<T>(a.masks.zoneout_h, t, a.rows.batch_row_at(r), p, n);
    return zoned<T>(a.masks.zoneout_h, share, h_prev, h);
  }

  // Units [u0, u0 + n), n <= W, of row r, whose activated gates are at `gate` as [4][W]: the new c and h.
  template <class A = Activation<T>>
  FASTLSTM_INLINE void cell(int64_t r, int64_t u0, int n, const R* gate) const {
    constexpr int W = kWidth<T>;
    const Gates<Vec<T>> g = {load(gate), load(gate + W), load(gate + 2 * W), load(gate + 3 * W)};
    const Vec<T> c = new_c(r, u0, n, g);
    new_h(r, u0, n, g.o * A::tanh(c));
  }

  // The c that h is computed from, by the gates g of these units; stores the gates, and c after its zoneout.
  FASTLSTM_INLINE Vec<T> new_c(int64_t r, int64_t u0, int n, const Gates<Vec<T>>& g) const {
    const int64_t H = a.H, at = r * H + u0;
    const bool full = n == kWidth<T>;
    auto get = [&](const R* p) { return full ? load(p) : load_part(p, n); };
    auto put = [&](auto* p, Vec<T> v) { full ? store(p, v) : store_part(p, v, n); };
    const Vec<T> c_prev = a.rows.fresh_at(t, r) ? Vec<T>{} : get(c_in + at);
    const Vec<T> c = next_c(g, c_prev);
    Vec<T> state = c;
    if (masked && a.masks.zoneout_c)
      state = zoned<T>(a.masks.zoneout_c, load_mask<T>(a.masks.zoneout_c, t, a.rows.batch_row_at(r), u0, n),
                       c_prev, c);
    if (gates) {
      T* saved = gates + r * 4 * H + 4 * u0;
      put(saved, g.i);
      put(saved + n, g.f);
      put(saved + 2 * n, g.g);
      put(saved + 3 * n, g.o);
    }
    put(a.c + at, state);
    if (a.cells) put(a.cells + a.rows.row_at(t, r) * a.cells_stride + u0, state);
    return c;
  }

  // Stores h, before its projection, of these units.
  FASTLSTM_INLINE void new_h(int64_t r, int64_t u0, int n, Vec<T> h) const {
    auto put = [&](auto* p, Vec<T> v) { n == kWidth<T> ? store(p, v) : store_part(p, v, n); };
    if (a.hidden) return put(a.hidden + r * a.H + u0, h);
    const Vec<T> y = zoned_h(h, r, u0, n);
    put(a.y + a.rows.row_at(t, r) * a.y_stride + u0, y);
    put(h_out + r * a.P + u0, entering_next(y, r, u0, n));
  }

  // Features [begin, end) of h = hidden W_hr^T for rows [r0, r1), at most kRowBlockRows, to the state and to
  // y.
  void project(int64_t r0, int64_t r1, int64_t begin, int64_t end, R* out /* [., projected_stride] */) const {
    constexpr int64_t W2 = kPanel<T>;
    const int64_t H = a.H, P = a.P, ld = projected_stride<T>(P);
    const R* hidden = a.hidden + r0 * H;
    if (a.hr.mode == WeightMode::unpacked)
      for_row_tiles(r1 - r0, kDirectTile, [&](int64_t first, int R) {
        for (int64_t p = begin; p < end; p += 2 * W2)
          project_rows(R, hidden + first * H, p, end, out + first * ld + p);
      });
    else
      for (int64_t p = begin; p < end; p += W2)
        panel_product(r1 - r0, H, hidden, H, a.hr.packed + p * H, out + p, ld);
    for (int64_t r = r0; r < r1; ++r) {
      const R* h = out + (r - r0) * ld + begin;
      T* y = a.y + a.rows.row_at(t, r) * a.y_stride + begin;
      R* state = h_out + r * P + begin;
      for (int64_t p = 0; p < end - begin; p += kWidth<T>) {
        const int n = static_cast<int>(std::min<int64_t>(kWidth<T>, end - begin - p));
        const Vec<T> v = zoned_h(load_part(h + p, n), r, begin + p, n);
        store_part(y + p, v, n);
        store_part(state + p, entering_next(v, r, begin + p, n), n);
      }
    }
  }

  // Four vectors of features from p on, what lies behind `end` being that before it, from W_hr as stored.
  template <int M = kDirectTile>
  FASTLSTM_INLINE void project_rows(int rows, const R* hidden, int64_t p, int64_t end, R* out) const {
    if constexpr (M > 0) {
      if (rows < M) return project_rows<M - 1>(rows, hidden, p, end, out);
      constexpr int W = kWidth<T>;
      Vec<T> lanes[M][4][W];
      for (int u = 0; u < W; ++u) {
        const T* w[4];
        for (int q = 0; q < 4; ++q) w[q] = a.hr.stored + std::min(p + q * W + u, end - 1) * a.H;
        Vec<T> acc[M][4] = {};
        multiply_rows<T, M>(hidden, a.H, w, a.H, acc);
        for (int r = 0; r < M; ++r)
          for (int q = 0; q < 4; ++q) lanes[r][q][u] = acc[r][q];
      }
      for (int r = 0; r < M; ++r)
        for (int q = 0; q < 4; ++q) store(out + r * projected_stride<T>(a.P) + q * W, sums<T>(lanes[r][q]));
    }
  }

  // The packed weights of the unit block at u0, W_ih's only if they are to be used, and where the block that
  // is read after it has its W_hh, if not behind.
  struct Weights {
    const S *ih, *hh, *next_hh;
  };
  FASTLSTM_INLINE Weights weights(int64_t u0, bool ahead, bool left_is_next) const {
    if (a.hh.mode == WeightMode::unpacked) return {};
    const S* hh = packed_block(a.hh, a.H, a.P, u0, block + a.I * kGateBlock<T>);
    return {ahead ? nullptr : packed_block(a.ih, a.H, a.I, u0, block), hh,
            left_is_next && a.hh.mode == WeightMode::prepacked ? hh - a.P * kGateBlock<T> : nullptr};
  }

  // pre [rows][4][gap] (+)= the pre-activations of rows from r0 on and the unit block at u0; those of x are
  // there already if `ahead`.
  FASTLSTM_INLINE void products(int64_t rows, int64_t r0, int64_t u0, const Weights& w, R* pre,
                                bool ahead) const {
    const int64_t gap = gate_gap<T>(a.H, u0);
    const R *xr = x + r0 * a.I, *hr = h_in + r0 * a.P;
    if (a.hh.mode != WeightMode::unpacked) {
      if (!ahead) block_product(rows, a.I, xr, a.I, w.ih, gap, pre, false);
      return block_product(rows, a.P, hr, a.P, w.hh, gap, pre, true, w.next_hh);
    }
    Factors<T> of_x{x_factor, a.ih.stored, a.I}, of_h{h_factor, a.hh.stored, a.P};
    of_x.v += (r0 - first_row) * of_x.stride();
    of_h.v += (r0 - first_row) * of_h.stride();
    ahead ? direct_product<T, 1>(rows, {of_h}, a.H, u0, gap, pre, true)
          : direct_product<T, 2>(rows, {of_x, of_h}, a.H, u0, gap, pre, false);
  }

  // Rows [r0, r1), at most kRowBlockRows, of the unit block at u0. `pre` [rows][4][gap] holds x W_ih^T
  // already if `ahead`; the activated gates take its place as [rows][4][W].
  FASTLSTM_INLINE void units(int64_t r0, int64_t r1, int64_t u0, const Weights& w, R* pre, bool ahead) const {
    constexpr int W = kWidth<T>;
    constexpr int64_t ld = kGateBlock<T>;
    const int64_t rows = r1 - r0, gap = gate_gap<T>(a.H, u0);
    products(rows, r0, u0, w, pre, ahead);
    const int n = static_cast<int>(std::min<int64_t>(W, a.H - u0));
    // Gates and cells apart: a cell waits for its gates and then for its tanh, and the scheduler of a CPU
    // reaches other rows' work only where all of it fits a few dozen instructions.
    Vec<T> bias[4];
    for (int gate = 0; gate < 4; ++gate) bias[gate] = load_part(a.bias + gate * a.H + u0, n);
    for (R* p = pre; p < pre + rows * ld; p += ld) {
      const Gates<Vec<T>> gate =
          activate<Activation<T>>(Gates<Vec<T>>{load(p) + bias[0], load(p + gap) + bias[1],
                                                load(p + 2 * gap) + bias[2], load(p + 3 * gap) + bias[3]});
      store(p, gate.i);
      store(p + W, gate.f);
      store(p + 2 * W, gate.g);
      store(p + 3 * W, gate.o);
    }
    for (int64_t r = r0; r < r1; ++r) {
      if (gates) {  // a row's gates lie 4H elements after the last one's, where no hardware prefetch finds
                    // them
        const T* soon = gates + (r + 4) * 4 * a.H + 4 * u0;
        __builtin_prefetch(soon, 1, 3);
        __builtin_prefetch(soon + 2 * W, 1, 3);
      }
      cell(r, u0, n, pre + (r - r0) * ld);
    }
  }
};

// x W_ih^T of a member's rows and units for some steps at once, in pre [unit blocks][hoist_rows][4][gap].
template <class T, class S>
struct AheadProduct : HoistedSteps<Real<T>> {
  using R = Real<T>;
  const ForwardArgs<T, S>& a;
  R* pre;
  R* x;      // [hoist_rows, I]  the member's own rows, one after the other
  R* block;  // a unit block's weights, where they are packed for one use
  R* split;  // rows of x by split_rows

  AheadProduct(const ForwardArgs<T, S>& a, const Member& me, R* pre, R* x, R* block, R* split)
      : HoistedSteps<R>{a.rows, me, a.reverse, a.ih.mode == WeightMode::prepacked},
        a(a),
        pre(pre),
        x(x),
        block(block),
        split(split) {}

  // The pre-activations of step s from its first row and unit on; makes those of the next steps where needed.
  R* at(int64_t s) {
    if (s == this->end_s)
      if (const int64_t total = this->select(s)) make(total, this->gather(s, a.x, a.I, x));
    return this->used ? pre + this->first_row_of(s) * kGateBlock<T> : pre;
  }

  void make(int64_t total, const R* from) {
    R* out = pre;
    if (a.ih.mode == WeightMode::unpacked) from = factor_rows<T>(from, total, a.I, split);
    for (int64_t u = this->me.unit_begin; u < this->me.unit_end;
         u += kWidth<T>, out += hoist_rows(a.rows.N) * kGateBlock<T>) {
      const int64_t gap = gate_gap<T>(a.H, u);
      if (a.ih.mode == WeightMode::unpacked)
        direct_product<T, 1>(total, {{from, a.ih.stored, a.I}}, a.H, u, gap, out, false);
      else
        block_product(total, a.I, from, a.I, packed_block(a.ih, a.H, a.I, u, block), gap, out, false);
    }
  }
};

template <class T, class S>
void forward(const ForwardArgs<T, S>& a, const Member& me) {
  using R = Real<T>;
  constexpr int64_t W = kWidth<T>;
  const int64_t steps = a.rows.T;
  const int64_t blocks = (me.unit_end - me.unit_begin + W - 1) / W;
  const ForwardScratch<T> parts(a.rows.N, a.I, a.H, a.P);
  R* scratch = a.scratch + me.index * parts.size;
  R* projected = scratch + parts.projected;
  AheadProduct<T, S> product(a, me, scratch, scratch + parts.x, scratch + parts.block, scratch + parts.split);
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = product.time(s), offset = a.rows.offset_at(t);
    const int64_t next_t = s + 1 < steps ? product.time(s + 1) : -1;
    R* pre = product.at(s);
    const int64_t next_block = product.used ? hoist_rows(a.rows.N) * kGateBlock<T> : 0;
    const int64_t r_begin = me.row_begin, end = std::min(me.row_end, a.rows.count_at(t));
    const int64_t rows = std::max<int64_t>(0, end - r_begin);
    R* const split = scratch + parts.split;
    const R *xr = a.x + (offset + r_begin) * a.I, *hr = a.h[s % 2] + r_begin * a.P;
    if (a.ih.mode == WeightMode::unpacked && !product.used) xr = factor_rows<T>(xr, rows, a.I, split);
    if (a.hh.mode == WeightMode::unpacked)
      hr = factor_rows<T>(hr, rows, a.P, split + kUnpackedMaxRows * split_stride<T>(a.I));
    const ForwardStep<T, S> step{a,
                                 t,
                                 a.x + offset * a.I,
                                 a.h[s % 2],
                                 s == 0 ? a.c0 : a.c,
                                 a.h[(s + 1) % 2],
                                 a.gates ? a.gates + offset * 4 * a.H : nullptr,
                                 next_t,
                                 scratch + parts.block,
                                 xr,
                                 hr,
                                 r_begin};
    // A unit block at a time for all rows, where its weights are packed for this step alone; else all blocks
    // for a row group.
    const bool by_block = steps == 1 && a.hh.mode != WeightMode::prepacked;
    const bool reverse_blocks =
        s % 2 == 1 && alternate_block_order(4.0 * a.P * (me.unit_end - me.unit_begin) * sizeof(S));
    for_row_tiles(rows, by_block ? std::max(rows, kRowBlockRows) : kRowBlockRows,
                  [&](int64_t first, int64_t count) {
                    const int64_t r0 = r_begin + first;
                    R* first_block = product.used ? pre + first * kGateBlock<T> : pre;
                    for (int64_t k = 0; k < blocks; ++k) {
                      const int64_t j = reverse_blocks ? blocks - 1 - k : k, u = me.unit_begin + j * W;
                      R* block = first_block + j * next_block;
                      const auto weights = step.weights(u, product.used, reverse_blocks && j > 0);
                      for_row_tiles(count, kRowBlockRows, [&](int64_t part, int64_t n) {
                        R* own = product.used ? block + part * kGateBlock<T> : block;
                        step.units(r0 + part, r0 + part + n, u, weights, own, product.used);
                      });
                    }
                    if (a.hidden && !me.barrier) step.project(r0, r0 + count, 0, a.P, projected);
                  });
    if (me.barrier) me.barrier->wait();
    if (a.hidden && me.barrier) {
      for_row_tiles(rows, kRowBlockRows, [&](int64_t first, int64_t count) {
        step.project(r_begin + first, r_begin + first + count, me.feature_begin, me.feature_end, projected);
      });
      me.barrier->wait();
    }
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
