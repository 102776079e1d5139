// What the backwards of all dtypes share: the rows of a chunk of steps, and the states that entered steps.
#pragma once

#include "cpu/layer.h"

namespace fastlstm {

// The packed rows [begin, end) of steps [first, first + steps) of direction d's own order, and the first of
// them in time.
struct Span {
  int64_t t0, begin, end;
  Span(const LayerSizes& s, const Ragged& ragged, int64_t d, int64_t first, int64_t steps)
      : t0(d == 1 ? s.T - first - steps : first),
        begin(ragged.rows(d).offset_at(t0)),
        end(t0 + steps == s.T ? ragged.N() : ragged.rows(d).offset_at(t0 + steps)) {}
  int64_t rows() const { return end - begin; }
};

// The state [N, P] that enters each step, from y: what dW_hh multiplies.
template <class T>
at::Tensor entering_states(const at::Tensor& y, const OptionalTensor& h0, const LayerSizes& s,
                           const Ragged& ragged, int64_t d) {
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
  });
  return states;
}

}  // namespace fastlstm
