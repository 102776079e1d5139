// What the backwards of all dtypes share: the rows of a chunk of steps, and the states that entered steps.
#pragma once

#include <ATen/ops/mm.h>

#include "cpu/layer.h"

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

// The state [N, P] that enters the product of each step, from y: what dW_hh multiplies.
template <class T, class R>
at::Tensor entering_states(const at::Tensor& y, const OptionalTensor& h0, const LayerSizes& s,
                           const Ragged& ragged, int64_t d, const RowMask<R>& mask) {
  at::Tensor states = new_empty({ragged.N(), s.P}, y);
  T* out = states.mutable_data_ptr<T>();
  const T* from = y.const_data_ptr<T>() + d * s.P;
  const T* initial = h0 ? h0->const_data_ptr<T>() + d * s.B * s.P : nullptr;
  const Rows rows = ragged.rows(d);
  ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t t, int64_t r) {
    const int64_t before = d == 1 ? t + 1 : t - 1;
    const bool held = before >= 0 && before < s.T && r < rows.count_at(before);
    T* to = out + packed_row * s.P;
    if (rows.fresh_at(t, r) || (!held && !initial))
      std::fill_n(to, s.P, T(0));
    else if (held)
      std::copy_n(from + rows.row_at(before, r) * s.D * s.P, s.P, to);
    else
      std::copy_n(initial + rows.batch_row_at(r) * s.P, s.P, to);
    if (mask) mask_state(mask, t, rows.batch_row_at(r), s.P, to);
  });
  return states;
}

// y again from what else forward kept: h = o * tanh(c), and its projection. The caller's rows past a length
// are zero. `block`: the units of a block of the saved gates (cpu/sequence.h); A: the type of arithmetic.
template <class T, class A>
at::Tensor output_again(const LayerSizes& s, const Ragged& ragged, at::TensorList weights,
                        const at::Tensor& cells, const at::Tensor& reserve, int64_t block) {
  constexpr int64_t kUnits = 64;  // whose c waits in a buffer; a multiple of every block
  const int64_t H = s.H, rows = s.rows(), features = s.D * s.P;
  const auto per_row = [&](at::IntArrayRef sizes) {
    return ragged.padded() ? new_zeros(sizes, cells) : new_empty(sizes, cells);
  };
  const at::Tensor y = per_row(s.per_row(features));
  for (int64_t d = 0; d < s.D; ++d) {
    const at::Tensor hidden = s.proj() ? per_row({rows, H}) : y;  // h before any projection
    const int64_t ld = s.proj() ? H : features;
    const T* c = cells.const_data_ptr<T>() + d * H;
    const T* gates = reserve.const_data_ptr<T>() + d * rows * 4 * H;
    T* h = hidden.mutable_data_ptr<T>() + (s.proj() ? 0 : d * s.P);
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
      const T *from = c + row * s.D * H, *gate = gates + packed_row * 4 * H;
      T* to = h + row * ld;
      A tanh_c[kUnits];
      for (int64_t first = 0; first < H; first += kUnits) {
        const int64_t end = std::min(H, first + kUnits);
        std::copy(from + first, from + end, tanh_c);
        kernels<A>().tanh(tanh_c, tanh_c, end - first);
        for (int64_t u = first; u < end; u += block) {
          const int64_t n = std::min(block, H - u);
          const T* o = gate + 4 * u + 3 * n;
          for (int64_t k = 0; k < n; ++k) to[u + k] = T(A(o[k]) * tanh_c[u - first + k]);
        }
      }
    });
    if (!s.proj()) continue;
    at::Tensor out = y.view({rows, features}).narrow(1, d * s.P, s.P);
    at::mm_out(out, hidden, DirectionWeights(s, weights, d).hr.t());
  }
  return y;
}

}  // namespace fastlstm
