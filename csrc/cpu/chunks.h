// What the backwards of all dtypes share: the rows of a chunk of steps, and the states that entered steps.
#pragma once

#include <ATen/ops/mm.h>

#include "cpu/masks.h"

namespace fastlstm {

// Steps [first, first + steps) of direction d's own order, and their packed rows [begin, end).
struct Span {
  int64_t first, steps, begin, end;
  Span(const LayerSizes& s, const Ragged& ragged, int64_t d, int64_t first, int64_t steps)
      : first(first), steps(steps) {
    const int64_t t0 = d == 1 ? s.T - first - steps : first;  // the first of them in time
    const Rows rows = ragged.rows(d);
    begin = rows.offset_at(t0);
    end = t0 + steps == s.T ? ragged.N() : rows.offset_at(t0 + steps);
  }
  int64_t rows() const { return end - begin; }
};

// The state [n] that enters step t of sorted row r: of `states`, what each step left in the caller's rows, or
// of `initial` [B, n], zeros if null. Null for zeros.
template <class T>
const T* entering_state(const Rows& rows, bool reverse, int64_t t, int64_t r, const T* states, int64_t stride,
                        const T* initial, int64_t n) {
  const int64_t row = rows.previous_row(reverse, t, r);
  if (row >= 0) return states + row * stride;
  return initial && row == Rows::kInitialState ? initial + rows.batch_row_at(r) * n : nullptr;
}

// The state [N, P] that enters the product of each step, from y: what dW_hh multiplies.
template <class T, class R>
at::Tensor entering_states(const at::Tensor& y, const OptionalTensor& h0, const LayerSizes& s,
                           const Ragged& ragged, int64_t d, const RowMask<R>& mask) {
  at::Tensor states = new_empty({ragged.N(), s.P}, y);
  T* out = states.mutable_data_ptr<T>();
  const T* from = y.const_data_ptr<T>() + d * s.P;
  const T* initial = h0 ? h0->const_data_ptr<T>() + d * s.B * s.P : nullptr;
  const Rows rows = ragged.rows(d);
  ragged.for_each_row([&](int64_t packed_row, int64_t, int64_t t, int64_t r) {
    const T* h = entering_state(rows, d == 1, t, r, from, s.D * s.P, initial, s.P);
    T* to = out + packed_row * s.P;
    h ? std::copy_n(h, s.P, to) : std::fill_n(to, s.P, T(0));
    if (mask) mask_state(mask, t, rows.batch_row_at(r), s.P, to);
  });
  return states;
}

// Recomputes y from what else forward saved: h = o * tanh(c), c before its zoneout and normalized, and its
// projection; then the zoneout of h, step by step. The caller's rows past a length are zero. T: Number; Kept:
// what h is rounded to before its projection and zoneout, Stored<T> or Real<T>, as in the float kernels
// (those of bfloat16 products round h before its projection as a factor).
template <class T, class Kept>
at::Tensor output_again(const LayerSizes& s, const Ragged& ragged, const LayerInputs& in,
                        const LayerMasks<T>& all_masks, const SavedResults& saved) {
  using R = Real<T>;
  using S = Stored<T>;
  constexpr bool kInPlace = std::is_same_v<Kept, S>;  // in y
  const int64_t H = s.H, P = s.P, D = s.D, rows_stored = s.rows(), block = saved_block<T>();
  const auto per_row = [&](at::IntArrayRef sizes, const at::Tensor& like) {
    return ragged.padded() ? new_zeros(sizes, like) : new_empty(sizes, like);
  };
  const at::Tensor y = per_row(s.per_row(D * P), in.x);
  const OptionalTensor h0 = contiguous(in.h0), c0 = contiguous(in.c0);
  const auto initial = [&](const OptionalTensor& state, int64_t d, int64_t n) {
    return state ? state->const_data_ptr<S>() + d * s.B * n : nullptr;
  };
  for (int64_t d = 0; d < D; ++d) {
    const Rows rows = ragged.rows(d);
    const RowMasks<R> masks = all_masks.of(d);
    const DirectionWeights w(s, in.weights, d);
    const LayerNorm<T> norm = s.norm ? LayerNorm<T>(w) : LayerNorm<T>();
    const bool has_own_buffer = s.proj() || !kInPlace;
    at::Tensor hidden = has_own_buffer ? per_row({rows_stored, H}, kInPlace ? in.x : real_like<T>(in.x)) : y;
    const S *cells = saved.cells.const_data_ptr<S>() + d * H, *first_c = initial(c0, d, H);
    const S* gates = saved.reserve.const_data_ptr<S>() + d * rows_stored * s.reserved();
    S* const out = y.mutable_data_ptr<S>() + d * P;
    Kept* h = hidden.mutable_data_ptr<Kept>() + (has_own_buffer ? 0 : d * P);
    int64_t ld = has_own_buffer ? H : D * P;
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t t, int64_t r) {
      thread_local std::vector<R> c;
      c.resize(H);
      const S* const gate = gates + packed_row * 4 * H;  // units u ... of i are at gate + 4 * u
      const auto each_block = [&](auto&& f) {
        for (int64_t u = 0; u < H; u += block) f(u, std::min(block, H - u), gate + 4 * u);
      };
      const S* from = !masks.zoneout_c ? cells + row * D * H
                                       : entering_state(rows, d == 1, t, r, cells, D * H, first_c, H);
      from ? std::copy_n(from, H, c.data()) : std::fill_n(c.data(), H, R(0));
      if (masks.zoneout_c)
        each_block([&](int64_t u, int64_t n, const S* i) {
          for (int64_t k = 0; k < n; ++k)
            c[u + k] = next_c<R>({R(i[k]), R(i[n + k]), R(i[2 * n + k]), R(0)}, c[u + k]);
        });
      if (s.norm) kernels<R>().normalize(c.data(), H, norm.weights().gain_c, norm.weights().bias_c);
      kernels<R>().tanh(c.data(), c.data(), H);
      each_block([&](int64_t u, int64_t n, const S* i) {
        Kept* to = h + row * ld + u;
        for (int64_t k = 0; k < n; ++k) to[k] = Kept(R(i[3 * n + k]) * c[u + k]);
      });
    });
    if (s.proj() && kInPlace) {
      at::Tensor projected = y.view({rows_stored, D * P}).narrow(1, d * P, P);
      at::mm_out(projected, hidden, w.hr.t());
    } else if (s.proj()) {
      hidden = at::mm(hidden, to_real<T>(w.hr.contiguous()).t());
    }
    if (kInPlace && !masks.zoneout_h) continue;
    h = kInPlace ? reinterpret_cast<Kept*>(out) : hidden.mutable_data_ptr<Kept>();
    ld = kInPlace ? D * P : P;
    const S* first_h = initial(h0, d, P);
    at::parallel_for(0, s.B, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0, n = ragged.length(r); k < n; ++k) {
          const int64_t t = d == 1 ? n - 1 - k : k, row = rows.row_at(t, r);
          if (masks.zoneout_h)
            zone(masks.zoneout_h, t, rows.batch_row_at(r), P,
                 entering_state(rows, d == 1, t, r, out, D * P, first_h, P), h + row * ld);
          if (!kInPlace) std::copy_n(h + row * ld, P, out + row * D * P);
        }
    });
  }
  return y;
}

}  // namespace fastlstm
