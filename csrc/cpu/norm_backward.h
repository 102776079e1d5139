// Backward of one direction with layer normalization: per step and row the cell's gradients, then those of
// both normalizations, then dh_{t-1} = dW_hh h times W_hh. A member owns whole rows.
#pragma once

#include "cpu/backward.h"
#include "cpu/norm.h"

namespace fastlstm::FASTLSTM_ISA {

// A member's scratch: of a row c, tanh(LN(c)), dh and dLN(c) * gain [4, H], the gradients of the gates [4H];
// the sums over the last rows; as backward_scratch.
template <class T>
struct NormBackwardScratch {
  int64_t dgates, sums, hidden, size;
  NormBackwardScratch(int64_t H, int64_t P)
      : dgates(4 * H),
        sums(dgates + 4 * H),
        hidden(sums + NormTerms::kSize * H),
        size(hidden + backward_scratch<T>(H, P)) {}
};
template <class T>
int64_t norm_backward_scratch(int64_t H, int64_t P) {
  return NormBackwardScratch<T>(H, P).size;
}
template <class T>
int64_t norm_sums(int64_t H) {
  return NormTerms::kSize * H;
}

// Sums of the terms of NormTerms.
template <class R>
struct NormSums {
  R *bias, *gain_ih, *gain_hh, *gain_c, *bias_c;
  NormSums(R* sums, int64_t H)
      : bias(sums + NormTerms::kBiases * H),
        gain_ih(sums + NormTerms::kGainX * H),
        gain_hh(sums + NormTerms::kGainH * H),
        gain_c(sums + NormTerms::kGainC * H),
        bias_c(sums + NormTerms::kBiasC * H) {}
};
template <class T>
FASTLSTM_INLINE void add_first(Real<T>* sum, Vec<T> v, int n) {
  store_first(sum, load_first(sum, n) + v, n);
}

template <class T, class S>
struct NormRow {
  using R = Real<T>;
  const CellRow<T, S>& cell;
  const NormSums<R>& sums;
  R* c;       // [H]
  R* tanh_c;  // [H]
  R* dh;      // [H]
  R* dg;      // [H]  dLN(c) * gain
  R* dgates;  // [4H]

  // The cell's gradients, into dgates.
  FASTLSTM_INLINE void cell_gradients() const {
    const BackwardArgs<T, S>& a = cell.a;
    const int64_t H = a.H;
    for_vectors<T>(H, [&](int64_t u, int n) {
      store_first(c + u, cell.c(u, n, cell.gates(u, n), cell.c_prev(u, n)), n);
    });
    const Moments<T> m = moments<T>(c, H);
    Vec<T> sum_g = {}, sum_gs = {};
    for_vectors<T>(H, [&](int64_t u, int n) {
      const Vec<T> s = m.standard(load_first(c + u, n)), gain = load_first(a.norm.gain_c + u, n);
      const Vec<T> tanh = Activation<T>::tanh(s * gain + load_first(a.norm.bias_c + u, n));
      const Vec<T> o = cell.gates(u, n).o, dh_t = cell.arriving_dh(u, n);
      const Vec<T> dnormalized = dh_t * (o * (1 - tanh * tanh)), g = dnormalized * gain;
      add_first<T>(sums.gain_c + u, dnormalized * s, n);
      add_first<T>(sums.bias_c + u, dnormalized, n);
      sum_g += g, sum_gs += g * s;
      store_first(tanh_c + u, tanh, n);
      store_first(dh + u, dh_t, n);
      store_first(dg + u, g, n);
      cell.store_hidden(u, n, o * tanh);
    });
    const Vec<T> mean_g = sum_elements<T>(sum_g) / R(H), mean_gs = sum_elements<T>(sum_gs) / R(H);
    for_vectors<T>(H, [&](int64_t u, int n) {
      const Vec<T> s = m.standard(load_first(c + u, n));
      Vec<T> kept, dc = cell.arriving_dc(u, n, kept);
      dc += m.gradient(load_first(dg + u, n), s, mean_g, mean_gs);
      const auto d = cell_derivatives(cell.gates(u, n), cell.c_prev(u, n), load_first(tanh_c + u, n));
      cell.store_gates(u, n, gate_gradients(d, load_first(dh + u, n), dc), dgates);
      cell.store_dc(u, n, dc + kept);
    });
  }

  // The gradients of W_ih x and W_hh h, from dgates.
  FASTLSTM_INLINE void product_gradients() const {
    const BackwardArgs<T, S>& a = cell.a;
    const int64_t G = 4 * a.H, row = cell.packed_row() - a.base;
    const T *ih = a.saved_ih + cell.packed_row() * G, *hh = a.saved_hh + cell.packed_row() * G;
    const Moments<T> of_ih = moments<T>(ih, G), of_hh = moments<T>(hh, G);
    Vec<T> sum_g[2] = {}, sum_gs[2] = {};
    const auto product = [&](const T* v, const Moments<T>& m, const R* gain, int64_t k, int n, Vec<T>& s) {
      s = m.standard(load_first(v + k, n));
      return load_first(dgates + k, n) * load_first(gain + k, n);
    };
    for_vectors<T>(G, [&](int64_t k, int n) {
      Vec<T> s;
      const Vec<T> g_ih = product(ih, of_ih, a.norm.gain_ih, k, n, s);
      sum_g[0] += g_ih, sum_gs[0] += g_ih * s;
      const Vec<T> g_hh = product(hh, of_hh, a.norm.gain_hh, k, n, s);
      sum_g[1] += g_hh, sum_gs[1] += g_hh * s;
    });
    for (int q = 0; q < 2; ++q)
      sum_g[q] = sum_elements<T>(sum_g[q]) / R(G), sum_gs[q] = sum_elements<T>(sum_gs[q]) / R(G);
    for_vectors<T>(G, [&](int64_t k, int n) {
      const Vec<T> d = load_first(dgates + k, n);
      Vec<T> s;
      const Vec<T> g_ih = product(ih, of_ih, a.norm.gain_ih, k, n, s);
      store_first(a.dgates + row * G + k, of_ih.gradient(g_ih, s, sum_g[0], sum_gs[0]), n);
      add_first<T>(sums.gain_ih + k, d * s, n);
      const Vec<T> g_hh = product(hh, of_hh, a.norm.gain_hh, k, n, s);
      store_first(a.dhh + row * G + k, of_hh.gradient(g_hh, s, sum_g[1], sum_gs[1]), n);
      add_first<T>(sums.gain_hh + k, d * s, n);
      add_first<T>(sums.bias + k, d, n);
    });
  }
};

template <class T, class S>
void norm_backward(const BackwardArgs<T, S>& a, const Member& me) {
  using R = Real<T>;
  constexpr int kBlock = 32;  // rows summed apart, so that rounding grows with N / 32 and not with N
  const int64_t H = a.H;
  const NormBackwardScratch<T> parts(H, a.P);
  R* scratch = a.scratch + me.index * parts.size;
  R *part = scratch + parts.sums, *total = a.norm_sums + me.index * norm_sums<T>(H);
  const NormSums<R> sums(part, H);
  int rows_summed = 0;
  const auto add_to_total = [&] {
    for (int64_t k = 0; k < norm_sums<T>(H); ++k) total[k] += part[k], part[k] = R(0);
    rows_summed = 0;
  };
  std::fill_n(part, norm_sums<T>(H), R(0));
  for (int64_t s = a.first + a.steps - 1; s >= a.first; --s) {
    const BackwardStep<T, S> step(a, me, s);
    if (a.w_hr) step.projected_gradients();
    for_row_tiles(step.rows, kRowBlockRows, [&](int64_t first, int64_t count) {
      const int64_t r0 = me.row_begin + first;
      R* dhidden = scratch + parts.hidden;
      if (a.w_hr) step.hidden_gradients(r0, count, dhidden);
      for (int64_t r = r0; r < r0 + count; ++r) {
        const CellRow<T, S> cell = step.cell(r, r0, dhidden);
        const NormRow<T, S> row{
            cell, sums, scratch, scratch + H, scratch + 2 * H, scratch + 3 * H, scratch + parts.dgates};
        row.cell_gradients();
        row.product_gradients();
        if (++rows_summed == kBlock) add_to_total();
      }
      step.previous_gradients(r0, count, a.dhh);
    });
  }
  add_to_total();
}

}  // namespace fastlstm::FASTLSTM_ISA
