// Forward of one direction with layer normalization: per step h W_hh^T of the member's rows, whole, since the
// statistics of a row need all its units; then row by row both normalizations and the cell.
#pragma once

#include "cpu/columns.h"
#include "cpu/forward.h"
#include "cpu/norm.h"

namespace fastlstm::FASTLSTM_ISA {

// A member's scratch: products of x for a row block or for some steps, the rows of x they are made of,
// products of h for a row block, with projection its result, and what weights read as stored take.
template <class T>
struct NormForwardScratch {
  int64_t x, of_h, projected, block, size;
  NormForwardScratch(int64_t N, int64_t I, int64_t H, int64_t P)
      : x(std::max(kRowBlockRows, hoist_rows(N)) * padded_columns<T>(4 * H)),
        of_h(x + hoist_rows(N) * I),
        projected(of_h + kRowBlockRows * padded_columns<T>(4 * H)),
        block(projected + (P == H ? 0 : kRowBlockRows * projected_stride<T>(P))),
        size(block + kUnpackedMaxRows * (kGateBlock<T> + split_stride<T>(std::max(I, P)))) {}
};

template <class T>
int64_t norm_forward_scratch(int64_t N, int64_t I, int64_t H, int64_t P) {
  return NormForwardScratch<T>(N, I, H, P).size;
}

// out [rows, 4H], rows padded_columns(4H) apart, = a [rows, K] times a weight [4H, K]^T. block: of the
// scratch.
template <class T, class S>
void gate_products(int64_t rows, int64_t K, const Real<T>* a, const GateWeight<T, S>& w, int64_t H,
                   Real<T>* out, Real<T>* block, bool reverse_blocks = false) {
  const int64_t ld = padded_columns<T>(4 * H);
  if (w.mode != WeightMode::unpacked)
    return product_packed(rows, K, a, K, w.packed, 0, 4 * H, out, ld, reverse_blocks);
  const Real<T>* v = factor_rows<T>(a, rows, K, block + kUnpackedMaxRows * kGateBlock<T>);
  for (int64_t u = 0; u < H; u += kWidth<T>) {
    const int64_t gap = gate_gap<T>(H, u), n = std::min<int64_t>(kWidth<T>, H - u);
    direct_product<T, 1>(rows, {{v, w.stored, K}}, H, u, gap, block, false);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t gate = 0; gate < 4; ++gate)
        std::copy_n(block + r * kGateBlock<T> + gate * gap, n, out + r * ld + gate * H + u);
  }
}

template <class T, class S>
struct NormStep {
  using R = Real<T>;
  const ForwardStep<T, S>& step;

  // The gates and c of row r from its products [4H]. c before its zoneout takes the place of the first H of
  // of_x, o that of the first H of of_h.
  FASTLSTM_INLINE void gates(int64_t r, R* of_x, R* of_h) const {
    const ForwardArgs<T, S>& a = step.a;
    const int64_t H = a.H, saved = (a.rows.offset_at(step.t) + r) * 4 * H;
    const Moments<T> ih = moments<T>(of_x, 4 * H), hh = moments<T>(of_h, 4 * H);
    for_vectors<T>(H, [&](int64_t u, int n) {
      Vec<T> pre[4];
#pragma GCC unroll 4
      for (int64_t gate = 0; gate < 4; ++gate) {
        const int64_t k = gate * H + u;
        const Vec<T> x = load_first(of_x + k, n), h = load_first(of_h + k, n);
        if (a.saved_ih) {
          store_first(a.saved_ih + saved + k, x, n);
          store_first(a.saved_hh + saved + k, h, n);
        }
        pre[gate] = ih.standard(x) * load_first(a.norm.gain_ih + k, n) +
                    (hh.standard(h) * load_first(a.norm.gain_hh + k, n) + load_first(a.bias + k, n));
      }
      const Gates<Vec<T>> g = activate<Activation<T>>(Gates<Vec<T>>{pre[0], pre[1], pre[2], pre[3]});
      store_first(of_x + u, step.new_c(r, u, n, g), n);
      store_first(of_h + u, g.o, n);
    });
  }

  // h of row r from what gates() left.
  FASTLSTM_INLINE void hidden(int64_t r, const R* c, const R* o) const {
    const NormWeights<R>& norm = step.a.norm;
    const Moments<T> m = moments<T>(c, step.a.H);
    for_vectors<T>(step.a.H, [&](int64_t u, int n) {
      const Vec<T> normalized =
          m.standard(load_first(c + u, n)) * load_first(norm.gain_c + u, n) + load_first(norm.bias_c + u, n);
      step.new_h(r, u, n, load_first(o + u, n) * Activation<T>::tanh(normalized));
    });
  }
};

template <class T, class S>
void norm_forward(const ForwardArgs<T, S>& a, const Member& me) {
  using R = Real<T>;
  const int64_t steps = a.rows.T, ld = padded_columns<T>(4 * a.H);
  const NormForwardScratch<T> parts(a.rows.N, a.I, a.H, a.P);
  R* of_x = a.scratch + me.index * parts.size;
  R *of_h = of_x + parts.of_h, *block = of_x + parts.block;
  HoistedSteps<R> hoisted{a.rows, me, a.reverse, a.ih.mode == WeightMode::prepacked};
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = hoisted.time(s), offset = a.rows.offset_at(t);
    if (s == hoisted.end_s)
      if (const int64_t total = hoisted.select(s))
        gate_products<T>(total, a.I, hoisted.gather(s, a.x, a.I, of_x + parts.x), a.ih, a.H, of_x, block);
    const ForwardStep<T, S> step{a,
                                 t,
                                 nullptr,
                                 a.h[s % 2],
                                 s == 0 ? a.c0 : a.c,
                                 a.h[(s + 1) % 2],
                                 a.gates ? a.gates + offset * 4 * a.H : nullptr,
                                 s + 1 < steps ? hoisted.time(s + 1) : -1,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 0};
    const NormStep<T, S> norm{step};
    const bool reverse_blocks = s % 2 == 1 && alternate_block_order(4.0 * a.P * a.H * sizeof(S));
    for_row_tiles(hoisted.rows_at(t), kRowBlockRows, [&](int64_t first, int64_t count) {
      const int64_t r0 = me.row_begin + first;
      R* x = hoisted.used ? of_x + (hoisted.first_row_of(s) + first) * ld : of_x;
      if (!hoisted.used) gate_products<T>(count, a.I, a.x + (offset + r0) * a.I, a.ih, a.H, x, block);
      gate_products<T>(count, a.P, step.h_in + r0 * a.P, a.hh, a.H, of_h, block, reverse_blocks);
      for (int64_t k = 0; k < count; ++k) norm.gates(r0 + k, x + k * ld, of_h + k * ld);
      for (int64_t k = 0; k < count; ++k) norm.hidden(r0 + k, x + k * ld, of_h + k * ld);
      if (a.hidden) step.project(r0, r0 + count, 0, a.P, of_x + parts.projected);
    });
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
