// Forward of a layer on CPU tensors: the time loop of an Engine's kernels on the plan's threads.
#include "cpu/engines.h"
#include "cpu/masks.h"

namespace fastlstm {
namespace {

template <class E>
LayerResults forward_with(const LayerInputs& in, const LayerSizes& s, const Ragged& ragged,
                          const ForwardPlan& plan, const PackedView* packed, bool keep_cells,
                          bool keep_reserve, const GivenResults& given = {}) {
  using T = typename E::Number;
  using R = Real<T>;
  using State = typename E::State;
  const int64_t N = ragged.N(), H = s.H, P = s.P, B = s.B, D = s.D;
  keep_cells |= keep_reserve;

  const auto empty = [&](at::IntArrayRef sizes) { return new_empty(sizes, in.x); };
  // Rows past a length are zero, and written by nobody.
  const auto per_step = [&](int64_t n) {
    return ragged.padded() ? new_zeros(s.per_row(D * n), in.x) : empty(s.per_row(D * n));
  };
  const at::Tensor y = given.y.defined() ? given.y : per_step(P),
                   h_n = given.h_n.defined() ? given.h_n : empty({D, B, P}),
                   c_n = given.c_n.defined() ? given.c_n : empty({D, B, H});
  const at::Tensor cells = keep_cells ? per_step(H) : packed ? at::Tensor() : empty({0});
  const at::Tensor reserve = keep_reserve ? empty(s.reserve()) : packed ? at::Tensor() : empty({0});
  if (s.rows() == 0) return {y, h_n, c_n, cells, reserve};
  // A padded batch fills its first N rows only; the rest must not differ from run to run.
  for (int64_t k = 0; keep_reserve && N < s.rows() && k < D * s.reserved() / (4 * H); ++k)
    std::fill_n(writable<T>(reserve) + (k * s.rows() + N) * 4 * H, (s.rows() - N) * 4 * H, T(0));

  const LayerMasks<T> all_masks(in);
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  typename E::Forward engine(in, s, ragged, plan, packed);
  // h is kept in two slots: a step reads one and writes the other.
  const int64_t ld = E::Forward::state_stride(P), slot = E::Forward::state_rows(B) * ld;
  Workspace space;
  PerDirection h_offset, c_offset, bias_offset, h0_offset;
  for (int64_t d = 0; d < D; ++d) {
    h_offset[d] = space.take<State>(2 * slot);
    c_offset[d] = space.take<R>(B * H);
    bias_offset[d] = space.take<R>(packed ? 0 : 4 * H);
    h0_offset[d] = space.take<R>(in.zoneout_h ? B * P : 0);
  }
  engine.reserve(space);
  space.allocate();

  const OptionalTensor h0 = contiguous(in.h0), c0 = contiguous(in.c0);
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights w = packed ? DirectionWeights() : DirectionWeights(s, in.weights, d);
    R *bias = packed ? packed->bias_sum<R>(d) : space.at<R>(bias_offset[d]), *c = space.at<R>(c_offset[d]);
    State* h = space.at<State>(h_offset[d]);
    if (!packed) sum_biases<T>(w.bias_ih, w.bias_hh, H, bias);
    for (int64_t k = 1; s.norm && k < 4; k += 2) add_numbers<T>(w.norm[k], bias);
    if (slot > B * P) std::fill_n(h, slot, State(0));  // padding
    gather_state<T>(h0, d, rows[d], P, h, ld);
    const RowMasks<R> masks = all_masks.of(d);
    R* first_h = space.at<R>(h0_offset[d]);
    if (masks.zoneout_h) gather_state<T>(h0, d, rows[d], P, first_h, P);
    for (int64_t r = 0; masks.recurrent && r < B; ++r)  // for the row's first step
      if (ragged.length(r) > 0)
        mask_state(masks.recurrent, d == 1 ? ragged.length(r) - 1 : 0, rows[d].batch_row_at(r), P,
                   reinterpret_cast<Stored<State>*>(h + r * ld));
    if (rows[d].fresh) {  // steps clear the state for the next; the first has none before it
      const int64_t t = d == 1 ? s.T - 1 : 0;
      for (int64_t r = 0; r < rows[d].count_at(t); ++r)
        if (rows[d].fresh_at(t, r)) std::fill_n(h + r * ld, P, State(0));
    }
    std::copy_n(h, slot, h + slot);  // a reverse row may begin at an odd step
    gather_state<T>(c0, d, rows[d], H, c, H);
    engine.prepare(
        space, d, w,
        {rows[d], d == 1, keep_reserve ? writable<T>(reserve) + d * s.rows() * s.reserved() : nullptr, bias,
         h, c, writable<T>(y) + d * P, keep_cells ? writable<T>(cells) + d * H : nullptr, D * P, D * H, masks,
         first_h});
  }
  run_partition(plan.partition, rows, H, P, E::unit_block(),
                [&](int64_t d, const Member& me) { engine.run(d, me); });

  for (int64_t d = 0; d < D; ++d) {
    for (int64_t r = 0; r < B; ++r) {
      // The state a forward row ends with is in the slot that its last step wrote; reverse rows all end with
      // the last step.
      const int64_t parity = (d == 1 ? s.T : ragged.length(r)) % 2;
      T* last = writable<T>(h_n) + (d * B + rows[d].batch_row_at(r)) * P;
      if (in.recurrent_mask && ragged.length(r) > 0)  // the slot may hold it masked
        std::copy_n(data_of<T>(y) + rows[d].row_at(d == 1 ? 0 : ragged.length(r) - 1, r) * D * P + d * P, P,
                    last);
      else if (in.recurrent_mask && h0)
        std::copy_n(data_of<T>(*h0) + (d * B + rows[d].batch_row_at(r)) * P, P, last);
      else
        copy_numbers(space.at<State>(h_offset[d]) + parity * slot + r * ld, P, last);
    }
    scatter_state<T>(space.at<R>(c_offset[d]), H, d, rows[d], H, c_n);
  }
  return {y, h_n, c_n, cells, reserve};
}

}  // namespace

template <class T>
LayerResults forward(const LayerInputs& in, bool keep_cells, bool keep_reserve, bool bf16_requested) {
  const LayerSizes s(in);
  const Ragged ragged(s, in.lengths, in.reset_mask);
  const ForwardPlan plan = plan_forward(layer_shape<T>(s, ragged, in.h0, bf16_requested), this_machine());
  return with_engine<T>(plan.engine, [&](auto engine) {
    return forward_with<decltype(engine)>(in, s, ragged, plan, nullptr, keep_cells, keep_reserve);
  });
}

template <class T>
LayerResults forward_frozen(const LayerInputs& in, const PackedView& packed, bool keep_cells,
                            const GivenResults& given) {
  const LayerSizes s(in, packed.header().known());
  const Ragged ragged(s, in.lengths, in.reset_mask);
  LayerShape shape = layer_shape<T>(s, ragged, in.h0);
  shape.frozen = static_cast<Frozen>(packed.header().frozen);
  const ForwardPlan plan = plan_forward(shape, this_machine());
  return with_forward_engine<T>(plan.engine, [&](auto engine) {
    return forward_with<decltype(engine)>(in, s, ragged, plan, &packed, keep_cells, /*keep_reserve=*/false,
                                          given);
  });
}

template LayerResults forward<float>(const LayerInputs&, bool, bool, bool);
template LayerResults forward<double>(const LayerInputs&, bool, bool, bool);
template LayerResults forward<Bf16>(const LayerInputs&, bool, bool, bool);
template LayerResults forward_frozen<float>(const LayerInputs&, const PackedView&, bool, const GivenResults&);
template LayerResults forward_frozen<double>(const LayerInputs&, const PackedView&, bool,
                                             const GivenResults&);
template LayerResults forward_frozen<Bf16>(const LayerInputs&, const PackedView&, bool, const GivenResults&);

}  // namespace fastlstm
