// Forward of a layer on CPU tensors: cpu/forward.h on the plan's threads.
#include "cpu/layer.h"

namespace fastlstm {
namespace {

// The weights of a direction that are packed before its steps, units [begin, end) of them.
template <class T, class S>
void pack_forward(const ForwardArgs<T, S>& a, int64_t begin, int64_t end) {
  const Kernels<T, S>& k = kernels<T, S>();
  if (a.ih.mode == WeightMode::prepacked) k.pack_forward(a.ih.stored, a.H, a.I, begin, end, a.ih.packed);
  if (a.hh.mode == WeightMode::prepacked) k.pack_forward(a.hh.stored, a.H, a.P, begin, end, a.hh.packed);
}

// On the plan's threads, with panels of S.
template <class T, class S>
LayerResults forward_on(const LayerSizes& s, const Ragged& ragged, const ForwardPlan& plan,
                        const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                        at::TensorList weights, bool keep_cells, bool keep_reserve) {
  using R = Real<T>;
  const Kernels<T, S>& kernel = kernels<T, S>();
  const int64_t N = ragged.N(), H = s.H, P = s.P, B = s.B, D = s.D;
  keep_cells |= keep_reserve;

  const auto empty = [&](at::IntArrayRef sizes) { return new_empty(sizes, x); };
  // Rows past a length are zero, and written by nobody.
  const auto per_step = [&](int64_t n) {
    return ragged.padded() ? new_zeros(s.per_row(D * n), x) : empty(s.per_row(D * n));
  };
  const at::Tensor y = per_step(P), h_n = empty({D, B, P}), c_n = empty({D, B, H});
  const at::Tensor cells = keep_cells ? per_step(H) : empty({0});
  const at::Tensor reserve = keep_reserve ? empty(s.reserve()) : empty({0});
  if (s.rows() == 0) return {y, h_n, c_n, cells, reserve};
  // A padded batch fills its first N rows only; the rest must not differ from run to run.
  for (int64_t d = 0; keep_reserve && N < s.rows() && d < D; ++d)
    std::fill_n(writable<T>(reserve) + (d * s.rows() + N) * 4 * H, (s.rows() - N) * 4 * H, T(0));

  const at::Tensor input = to_real<T>(packed_input<Stored<T>>(x, s, ragged));  // [N, I]
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  const ThreadPartition& threads = plan.partition;
  const bool pack_ih = plan.w_ih == WeightMode::prepacked, pack_hh = plan.w_hh == WeightMode::prepacked,
             pack_hr = s.proj() && plan.w_hr == WeightMode::prepacked;
  const int64_t ih_size = pack_ih ? kernel.forward_packed_size(H, s.I) : 0,
                hh_size = pack_hh ? kernel.forward_packed_size(H, P) : 0;

  // Workspace elements for a panel of n elements.
  const auto of_panels = [](int64_t n) { return (n * int64_t(sizeof(S)) + 3) / int64_t(sizeof(R)); };
  Workspace<R> space;
  PerDirection h_at, c_at, bias_at, ih_at, hh_at, hr_at, hidden_at;
  for (int64_t d = 0; d < D; ++d) {
    h_at[d] = space.take(2 * B * P);
    c_at[d] = space.take(B * H);
    bias_at[d] = space.take(4 * H);
    ih_at[d] = space.take(of_panels(threads.copies * ih_size));
    hh_at[d] = space.take(of_panels(threads.copies * hh_size));
    hr_at[d] = space.take(pack_hr ? of_panels(kernel.columns_packed_size(H, P)) : 0);
    hidden_at[d] = space.take(s.proj() ? B * H : 0);
  }
  const int64_t scratch_at = space.take(threads.threads() * kernel.forward_scratch(N, s.I, H, P));
  space.allocate(real_like<T>(x));
  const auto panels = [&](int64_t at) { return reinterpret_cast<S*>(space.at(at)); };

  std::vector<ForwardArgs<T, S>> args;
  std::vector<at::Tensor> hold;
  const OptionalTensor h0c = contiguous(h0), c0c = contiguous(c0);
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights w(s, weights, d);
    const at::Tensor w_ih = w.ih.contiguous(), w_hh = w.hh.contiguous();
    hold.insert(hold.end(), {w_ih, w_hh});
    sum_biases<T>(w.bias_ih, w.bias_hh, H, space.at(bias_at[d]));
    R* h = space.at(h_at[d]);
    gather_state<T>(h0c, d, rows[d], P, h, P);
    if (rows[d].fresh) {  // steps clear the state for the next; the first has none before it
      const int64_t t = d == 1 ? s.T - 1 : 0;
      for (int64_t r = 0; r < rows[d].count_at(t); ++r)
        if (rows[d].fresh_at(t, r)) std::fill_n(h + r * P, P, R(0));
    }
    std::copy_n(h, B * P, h + B * P);  // a reverse row may begin at an odd step
    gather_state<T>(c0c, d, rows[d], H, space.at(c_at[d]), H);
    if (pack_hr) pack_columns<T>(threads.threads(), w.hr.t(), panels(hr_at[d]));
    if (s.proj()) hold.push_back(w.hr.contiguous());
    args.push_back(
        {rows[d],
         s.I,
         H,
         P,
         d == 1,
         input.const_data_ptr<R>(),
         keep_reserve ? writable<T>(reserve) + d * s.rows() * 4 * H : nullptr,
         space.at(bias_at[d]),
         {data_of<T>(w_ih), pack_ih ? panels(ih_at[d]) : nullptr, plan.w_ih},
         {data_of<T>(w_hh), pack_hh ? panels(hh_at[d]) : nullptr, plan.w_hh},
         {s.proj() ? data_of<T>(hold.back()) : nullptr, pack_hr ? panels(hr_at[d]) : nullptr, plan.w_hr},
         s.proj() ? space.at(hidden_at[d]) : nullptr,
         {h, h + B * P},
         space.at(c_at[d]),
         space.at(c_at[d]),
         writable<T>(y) + d * P,
         keep_cells ? writable<T>(cells) + d * H : nullptr,
         D * P,
         D * H,
         space.at(scratch_at)});
    if ((pack_ih || pack_hh) && !threads.private_weights())
      for_blocks(threads.threads(), H, kernel.width, (pack_ih * s.I + pack_hh * P) * 4 * kernel.width,
                 [&](int64_t begin, int64_t end) { pack_forward(args[d], begin, end); });
  }
  run_partition(threads, rows, H, P, kernel.unit_block, [&](int64_t d, const Member& me) {
    ForwardArgs<T, S> mine = args[d];
    if (pack_ih) mine.ih.packed += threads.copy(me.index) * ih_size;
    if (pack_hh) mine.hh.packed += threads.copy(me.index) * hh_size;
    if (threads.private_weights()) pack_forward(mine, me.unit_begin, me.unit_end);
    kernel.forward(mine, me);
  });

  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < B; ++r) {
      const int64_t b = rows[d].batch_row_at(r);
      // The state a forward row ends with lies where its last step wrote it; reverse rows all end with the
      // last step.
      const int64_t parity = (d == 1 ? s.T : ragged.length(r)) % 2;
      const R* h = space.at(h_at[d]) + (parity * B + r) * P;
      copy_numbers(h, P, writable<T>(h_n) + (d * B + b) * P);
      copy_numbers(space.at(c_at[d]) + r * H, H, writable<T>(c_n) + (d * B + b) * H);
    }
  return {y, h_n, c_n, cells, reserve};
}

}  // namespace

template <class T>
LayerResults forward(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                     at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                     bool keep_cells, bool keep_reserve) {
  const LayerSizes s(x, weights, lengths);
  s.check_inputs(x, h0, c0, lengths, reset_mask);
  const Ragged ragged(s, lengths, reset_mask);
  const ForwardPlan plan = plan_forward(layer_shape<T>(s, ragged, h0), this_machine());
  if constexpr (std::is_same_v<T, Bf16>) {
    if (plan.driver == Driver::bf16_products)
      return forward_bf16(s, ragged, plan, x, h0, c0, weights, keep_cells, keep_reserve);
    if (plan.driver == Driver::bf16_panels)
      return forward_on<T, PanelBf16>(s, ragged, plan, x, h0, c0, weights, keep_cells, keep_reserve);
  }
  return forward_on<T, Real<T>>(s, ragged, plan, x, h0, c0, weights, keep_cells, keep_reserve);
}

#define FASTLSTM_INSTANTIATE(T)                                                                        \
  template LayerResults forward<T>(const at::Tensor&, const OptionalTensor&, const OptionalTensor&,    \
                                   at::TensorList, const OptionalTensor&, const OptionalTensor&, bool, \
                                   bool);
FASTLSTM_INSTANTIATE(float)
FASTLSTM_INSTANTIATE(double)
FASTLSTM_INSTANTIATE(Bf16)
#undef FASTLSTM_INSTANTIATE

}  // namespace fastlstm
