// Backward of a layer on CPU tensors: the time loop of an Engine's kernels in chunks of steps, and after each
// chunk the products and sums over its rows.
#include <ATen/ops/zeros.h>

#include "cpu/engines.h"
#include "cpu/masks.h"

namespace fastlstm {
namespace {

// dW_hh [4H, P] (+)= dgates^T times the states that entered the span's steps. In a plain batch these are y
// one step on, and h0, without a copy.
template <class Operand, class WeightGradient>
void recurrent_gradient(const Span& span, MatrixView<Operand> dgates, const Operand* y, const Operand* h0,
                        const LayerSizes& s, int64_t d, bool add, WeightGradient& dw) {
  const bool reverse = d == 1;
  // The direction's first step is among them.
  const bool initial = reverse ? span.end == s.rows() : span.begin == 0;
  const bool from_h0 = initial && h0;
  const int64_t others = span.rows() - (initial ? s.B : 0);
  const int64_t from = reverse ? span.begin + s.B : span.begin - (initial ? 0 : s.B);
  const MatrixView<Operand> states = {y + d * s.P, s.D * s.P};
  if (others > 0 || !from_h0)  // of no rows: zeros
    dw.add(others, dgates.from(initial && !reverse ? s.B : 0), others > 0 ? states.from(from) : states, add);
  if (from_h0) dw.add(s.B, dgates.from(reverse ? others : 0), {h0 + d * s.B * s.P, s.P}, add || others > 0);
}

// A chunk's dgates [n, G] as a direction's columns of dx, whose rows have this stride, unless they are stored
// there already.
template <class Operand, class InputGradient>
void store_dgates(MatrixView<Operand> dgates, int64_t n, int64_t G, InputGradient* dx, int64_t stride) {
  if (static_cast<const void*>(dgates.data) == dx) return;
  at::parallel_for(0, n, kRowCopyTaskMinRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) copy_numbers(dgates.data + r * dgates.stride, G, dx + r * stride);
  });
}

template <class E>
LayerGradients backward_with(const ResultGradients& grads, const LayerInputs& in, const LayerSizes& s,
                             const Ragged& ragged, const SavedResults& saved, const c10::List<bool>& needs,
                             const BackwardPlan& plan) {
  using T = typename E::Number;
  using R = Real<T>;
  using Operand = typename E::Operand;
  using InputGradient = typename E::InputGradient;
  const int64_t N = ragged.N(), H = s.H, P = s.P, B = s.B, D = s.D, chunk = plan.chunk_steps;
  const at::TensorList weights = in.weights;
  const auto need = [&](int64_t d, int64_t k) { return needs[3 + d * s.per_direction + k]; };
  const int64_t hr = s.per_direction - 1;  // weight_hr among a direction's weights
  const bool need_dx = needs[0], wants_dgates = s.wants_dgates(needs);
  const int64_t dx_features = s.dx_features(needs);
  const bool need_hr[2] = {s.proj() && need(0, hr), s.proj() && D == 2 && need(1, hr)};
  const bool need_ih = need(0, 0) || (D == 2 && need(1, 0));
  const auto none = [&] { return new_empty({0}, in.x); };

  const LayerMasks<T> masks(in);
  const bool need_hh = need(0, 1) || (D == 2 && need(1, 1));   // y and h0 are factors of dW_hh alone
  const bool y_enters = ragged.plain() && !in.recurrent_mask;  // h enters the steps as y and h0 hold it
  // Otherwise the states that enter are copied in the wider type: forward masked h before it rounded a
  // factor.
  constexpr bool kRoundsStates = std::is_same_v<Operand, Bf16> && !std::is_same_v<T, Bf16>;
  const auto as_states = [&](const at::Tensor& h) { return kRoundsStates && !y_enters ? h : E::operands(h); };
  const auto output = [&] {
    const auto again = in.masked() || s.norm ? output_again<T, R> : output_again<T, Stored<T>>;
    return as_states(lacks_output(saved.y) ? again(s, ragged, in, masks, saved) : saved.y.contiguous());
  };
  const at::Tensor y = need_hh ? output() : at::Tensor();
  const OptionalTensor dy = contiguous(grads.dy), dcells = contiguous(grads.dcells),
                       dh_n = contiguous(grads.dh_n), dc_n = contiguous(grads.dc_n), c0 = contiguous(in.c0),
                       h0 = need_hh && in.h0 ? OptionalTensor(as_states(in.h0->contiguous())) : std::nullopt;
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  typename E::Backward engine(in, s, plan, need_dx && !wants_dgates, need_hr);
  const int64_t ld = E::Backward::gradient_stride(P);
  Workspace space;
  PerDirection dh_offset, dc_offset, c0_offset, kept_offset;
  for (int64_t d = 0; d < D; ++d) {
    dh_offset[d] = space.take<R>(B * ld);
    dc_offset[d] = space.take<R>(B * H);
    c0_offset[d] = space.take<R>(B * H);
    kept_offset[d] = space.take<R>(in.zoneout_h ? B * ld : 0);
  }
  engine.reserve(space);
  space.allocate();
  for (int64_t d = 0; d < D; ++d) {
    R *dh = space.at<R>(dh_offset[d]), *dc = space.at<R>(dc_offset[d]), *first_c = space.at<R>(c0_offset[d]);
    gather_state<T>(dh_n, d, rows[d], P, dh, ld);
    gather_state<T>(dc_n, d, rows[d], H, dc, H);
    gather_state<T>(c0, d, rows[d], H, first_c, H);
    engine.prepare(space, d, DirectionWeights(s, weights, d),
                   {rows[d], d == 1, data_of<T>(saved.reserve) + d * s.rows() * s.reserved(),
                    data_of<T>(saved.cells) + d * H, first_c, dy ? data_of<T>(*dy) + d * P : nullptr,
                    dcells ? data_of<T>(*dcells) + d * H : nullptr, D * H, D * P, D * H, dh, dc, masks.of(d),
                    space.at<R>(kept_offset[d])});
  }

  std::vector<at::Tensor> dweights;
  for (size_t k = 0; k < weights.size(); ++k)
    dweights.push_back(needs[3 + k] ? new_empty(weights[k].sizes(), in.x) : none());
  using WeightGradient = std::optional<typename E::WeightGradient>;
  WeightGradient dw_ih[2], dw_hh[2], dw_hr[2];
  at::Tensor db[2], states[2];  // of both biases in R; h that enters each step [N, P], if not read from y
  for (int64_t d = 0; d < D; ++d) {
    at::Tensor* const dw = dweights.data() + d * s.per_direction;
    if (need(d, 0)) dw_ih[d].emplace(dw[0], plan.dw_ih);
    if (need(d, 1)) dw_hh[d].emplace(dw[1], plan.dw_hh);
    if (need_hr[d]) dw_hr[d].emplace(dw[hr], plan.dw_hr);
    if (s.bias && (need(d, 2) || need(d, 3)))
      db[d] = std::is_same_v<T, R> ? dw[need(d, 2) ? 2 : 3] : new_empty({4 * H}, real_like<T>(in.x));
    if (need(d, 1) && !y_enters) {
      using Entering = Stored<std::conditional_t<kRoundsStates, T, Operand>>;
      states[d] = entering_states<Entering>(y, h0, s, ragged, d, masks.of(d).recurrent);
      if constexpr (kRoundsStates) states[d] = E::operands(states[d]);
    }
  }
  const at::Tensor x = need_ih ? E::operands(packed_input<Stored<T>>(in.x, s, ragged)) : at::Tensor();
  // Both directions add to dx, each from its own end.
  const at::DimVector dx_sizes = ragged.padded() ? at::DimVector{N, dx_features} : s.per_row(dx_features);
  const at::Tensor like = E::input_gradient_like(in.x), dx_rows = !need_dx ? none()
                                                                  : D == 1 ? new_empty(dx_sizes, like)
                                                                           : new_zeros(dx_sizes, like);

  for (int64_t end = s.T; end > 0; end -= std::min(end, chunk)) {
    const int64_t first = std::max<int64_t>(0, end - chunk);
    const bool add = end < s.T;
    const auto dx_of = [&](const Span& span) {
      return need_dx ? writable<InputGradient>(dx_rows) + span.begin * dx_features : nullptr;
    };
    for (int64_t d = 0; d < D; ++d) {
      const Span span(s, ragged, d, first, end - first);
      engine.select_steps(d, span, wants_dgates && D == 1 ? dx_of(span) : nullptr);
    }
    run_partition(plan.partition, rows, H, P, E::unit_block(),
                  [&](int64_t d, const Member& me) { engine.run(d, me); });
    for (int64_t d = 0; d < D; ++d) {
      const Span span(s, ragged, d, first, end - first);
      const int64_t n = span.rows();
      const MatrixView<Operand> dgates = engine.dgates(d), dhh = engine.dhh(d);
      if (need_dx && wants_dgates)
        store_dgates(dgates, n, 4 * H, dx_of(span) + d * 4 * H, dx_features);
      else if (need_dx && n > 0)
        engine.input_gradient(d, n, dx_of(span));
      if (dw_ih[d]) dw_ih[d]->add(n, dgates, {data_of<Operand>(x) + span.begin * s.I, s.I}, add);
      if (dw_hh[d] && y_enters)
        recurrent_gradient<Operand>(span, dhh, data_of<Operand>(y), h0 ? data_of<Operand>(*h0) : nullptr, s,
                                    d, add, *dw_hh[d]);
      else if (dw_hh[d])
        dw_hh[d]->add(n, dhh, {data_of<Operand>(states[d]) + span.begin * P, P}, add);
      if (db[d].defined()) engine.bias_gradient(d, n, add, db[d].template mutable_data_ptr<R>());
      if (dw_hr[d]) dw_hr[d]->add(n, engine.dr(d), engine.hidden(d), add);
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    for (WeightGradient* dw : {&dw_ih[d], &dw_hh[d], &dw_hr[d]})
      if (*dw) (*dw)->finish();
    if (db[d].defined()) engine.finish_bias(d, db[d].template mutable_data_ptr<R>());
    for (int64_t k = 2; db[d].defined() && k < 4; ++k) {
      const at::Tensor& out = dweights[d * s.per_direction + k];
      if (need(d, k) && !out.is_same(db[d]))
        copy_numbers(db[d].template const_data_ptr<R>(), 4 * H, writable<T>(out));
    }
    for (int64_t k = 0; s.norm && k < kNormWeights; ++k)
      if (need(d, s.first_norm() + k)) {
        const at::Tensor& out = dweights[d * s.per_direction + s.first_norm() + k];
        std::vector<R> sums(out.numel());
        engine.norm_gradient(d, k, sums.data());
        copy_numbers(sums.data(), out.numel(), writable<T>(out));
      }
  }

  at::Tensor dx = dx_rows;
  if (need_dx && ragged.padded()) {
    dx = new_zeros(s.per_row(dx_features), in.x);
    const InputGradient* from = data_of<InputGradient>(dx_rows);
    T* to = writable<T>(dx);
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
      copy_numbers(from + packed_row * dx_features, dx_features, to + row * dx_features);
    });
  } else if (need_dx && !std::is_same_v<T, InputGradient>) {
    dx = from_real<T>(dx_rows);
  }
  const auto state_gradient = [&](int64_t k, const PerDirection& at, int64_t n, int64_t stride) {
    if (!needs[k]) return none();
    at::Tensor grad = new_empty({D, B, n}, in.x);
    for (int64_t d = 0; d < D; ++d) scatter_state<T>(space.at<R>(at[d]), stride, d, rows[d], n, grad);
    return grad;
  };
  return {dx, state_gradient(1, dh_offset, P, ld), state_gradient(2, dc_offset, H, H), dweights};
}

}  // namespace

template <class T>
LayerGradients backward(const ResultGradients& grads, const LayerInputs& in, const SavedResults& given,
                        const c10::List<bool>& needs, bool bf16_requested) {
  const LayerSizes s(in);
  // A saved-tensor hook may give back other strides.
  const at::Tensor cells = given.cells.contiguous(), reserve = given.reserve.contiguous();
  const SavedResults saved{given.y, cells, reserve};
  s.check_backward(in.x, grads, saved, needs);
  if (s.rows() == 0) {
    const auto zeros = [&](int64_t i, at::IntArrayRef sizes) {
      return needs[i] ? at::zeros(sizes, in.x.options()) : new_empty({0}, in.x);
    };
    std::vector<at::Tensor> dweights;
    for (size_t k = 0; k < in.weights.size(); ++k) dweights.push_back(zeros(3 + k, in.weights[k].sizes()));
    return {zeros(0, s.per_row(s.dx_features(needs))), zeros(1, {s.D, s.B, s.P}), zeros(2, {s.D, s.B, s.H}),
            dweights};
  }
  const Ragged ragged(s, in.lengths, in.reset_mask);
  const BackwardPlan plan = plan_backward(layer_shape<T>(s, ragged, in.h0, bf16_requested), this_machine());
  return with_engine<T>(plan.engine, [&](auto engine) {
    return backward_with<decltype(engine)>(grads, in, s, ragged, saved, needs, plan);
  });
}

template LayerGradients backward<float>(const ResultGradients&, const LayerInputs&, const SavedResults&,
                                        const c10::List<bool>&, bool);
template LayerGradients backward<double>(const ResultGradients&, const LayerInputs&, const SavedResults&,
                                         const c10::List<bool>&, bool);
template LayerGradients backward<Bf16>(const ResultGradients&, const LayerInputs&, const SavedResults&,
                                       const c10::List<bool>&, bool);

}  // namespace fastlstm
