// Backward of a layer on CPU tensors: the time loop of cpu/backward.h in chunks of steps, and after each
// chunk the products and sums over its rows.
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "cpu/chunks.h"
#include "cpu/layer.h"
#include "cpu/product.h"

namespace fastlstm {
namespace {

// A weight's gradient dw [m, n], summed over the chunks of steps: dgates [rows, m]^T times states [rows, n].
// A bias's is summed elsewhere, in sum(), and stored by finish(). If the plan says at_once, add() is called
// once.
class WeightGradient {
 public:
  WeightGradient(const at::Tensor& dw, const WgradPlan& given) : dw_(dw), sum_(dw) {
    const WgradPlan plan = dw.dim() == 2 ? given : WgradPlan{};  // else a bias, or not wanted
    narrow_ = dw.scalar_type() == at::kBFloat16;
    in_blocks_ = narrow_ && plan.at_once;
    if (narrow_ && !in_blocks_) sum_ = new_empty(dw.sizes(), real_like<Bf16>(dw));
    transposed_ = plan.transposed;
    if (transposed_) sum_ = new_empty({dw.size(1), dw.size(0)}, sum_);
    if (plan.float64) total_ = at::zeros_like(sum_, at::kDouble);
  }
  // States with row stride ld.
  template <class T>
  void add(int64_t rows, const T* dgates, const T* states, int64_t ld, bool add) {
    if constexpr (std::is_same_v<T, float>)
      if (in_blocks_) return multiply_in_blocks(rows, dgates, states, ld);
    const int64_t m = dw_.size(0), n = dw_.size(1), most = total_.defined() ? kFloat64WgradBlockRows : rows;
    T* out = sum_.mutable_data_ptr<T>();
    if (rows == 0 && !add) std::fill_n(out, m * n, T(0));
    for (int64_t r = 0; r < rows; r += most) {
      const int64_t depth = std::min(most, rows - r);
      const T *left = dgates + r * m, *right = states + r * ld;
      const bool on = add && !total_.defined();
      if (transposed_)
        multiply<T>({n, m, depth, right, ld, true, left, m, on, out, m, nullptr});
      else
        multiply<T>({m, n, depth, left, m, true, right, ld, on, out, n, nullptr});
      if (total_.defined()) total_.add_(sum_);
    }
  }
  void finish() {
    const at::Tensor& found = total_.defined() ? total_ : sum_;
    if (found.is_same(dw_)) return;
    if (dw_.dim() == 1)  // sooner than the dispatcher
      return copy_numbers(found.const_data_ptr<float>(), found.numel(), writable<Bf16>(dw_));
    const at::Tensor dw = transposed_ ? found.t() : found;
    dw_.copy_(narrow_ ? dw.contiguous() : dw);  // a copy that transposes and rounds is slow
  }
  // Where a bias is summed.
  const at::Tensor& sum() const { return sum_; }

 private:
  // All N rows at once, some rows of dw at a time, so that these are rounded while a cache holds them. Sums
  // over several calls would be rounded in each.
  void multiply_in_blocks(int64_t rows, const float* dgates, const float* states, int64_t ld) {
    const int64_t m = dw_.size(0), n = dw_.size(1),
                  block = std::max<int64_t>(1, kBf16WgradBlockElements / std::max<int64_t>(16, n) / 16) * 16;
    if (rows == 0) {
      dw_.zero_();
      return;
    }
    Bf16* out = writable<Bf16>(dw_);
    for_blocks(at::get_num_threads(), m, block, block * n * rows, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> sums;
      sums.resize(std::max<size_t>(sums.size(), block * n));
      for (int64_t j = begin; j < end; j += block) {
        const int64_t count = std::min(block, end - j);
        multiply<float>({count, n, rows, dgates + j, m, true, states, ld, false, sums.data(), n, nullptr});
        copy_numbers(sums.data(), count * n, out + j * n);
      }
    });
  }

  at::Tensor dw_, sum_, total_;
  bool narrow_, in_blocks_, transposed_;
};

// dW_hh [4H, P] (+)= dgates^T times the states that entered the span's steps. In a plain batch these are y
// one step on, and h0, without a copy.
template <class T>
void recurrent_gradient(const Span& span, const T* dgates, const at::Tensor& y, const OptionalTensor& h0,
                        const LayerSizes& s, int64_t d, bool add, WeightGradient& dw) {
  const int64_t ld = s.D * s.P, G = 4 * s.H;
  const T* states = y.const_data_ptr<T>() + d * s.P;
  const bool reverse = d == 1;
  const bool initial =
      reverse ? span.end == s.rows() : span.begin == 0;  // the direction's first step is among them
  const bool from_h0 = initial && h0;
  const int64_t others = span.rows() - (initial ? s.B : 0);
  const int64_t from = reverse ? span.begin + s.B : span.begin - (initial ? 0 : s.B);
  if (others > 0 || !from_h0)  // of no rows: zeros
    dw.add(others, dgates + (initial && !reverse ? s.B * G : 0), states + from * ld, ld, add);
  if (from_h0)
    dw.add(s.B, dgates + (reverse ? others * G : 0), h0->const_data_ptr<T>() + d * s.B * s.P, s.P,
           add || others > 0);
}

// db [G] (+)= the sum of the rows of dgates [rows, G].
template <class T>
void bias_gradient(int64_t rows, const T* dgates, bool add, const at::Tensor& db) {
  const int64_t G = db.size(0);
  T* out = db.mutable_data_ptr<T>();
  constexpr int64_t kColumns = kBiasGradTaskColumns;
  const int64_t grain = kBiasGradTaskMinElements / (rows + 1) + 1;
  at::parallel_for(0, (G + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kColumns; j < std::min(G, end * kColumns); j += kColumns) {
      const int64_t n = std::min(kColumns, G - j);
      T sums[kColumns];
      kernels<T>().column_sums(dgates + j, rows, G, 0, n, sums);
      for (int64_t k = 0; k < n; ++k) out[j + k] = sums[k] + (add ? out[j + k] : T(0));
    }
  });
}

// Whether w [4H, D * 4H] is the part of an identity that is direction d's: so fastlstm/transforms.py asks for
// the gradients of the gates, and dx is these without a product.
template <class T>
bool is_identity(const at::Tensor& w, const LayerSizes& s, int64_t d) {
  const int64_t G = 4 * s.H;
  if (s.I != s.D * G) return false;
  const Stored<T>* row = w.const_data_ptr<Stored<T>>();
  for (int64_t r = 0; r < G; ++r, row += s.I)
    for (int64_t c = 0; c < s.I; ++c)
      if (row[c] != Stored<T>(c == d * G + r)) return false;
  return true;
}

// On the plan's threads, with panels of S.
template <class T, class S>
LayerGradients backward_on(const BackwardCall& call, const BackwardPlan& plan) {
  using R = Real<T>;
  const LayerSizes& s = call.s;
  const Ragged& ragged = call.ragged;
  const at::Tensor &x = call.x, &cells = call.cells, &reserve = call.reserve;
  const at::TensorList weights = call.weights;
  const c10::List<bool>& needs = call.needs;
  const int64_t H = s.H, P = s.P, B = s.B, D = s.D;
  const auto none = [&] { return new_empty({0}, x); };
  std::vector<at::Tensor> dweights;
  const Kernels<T, S>& kernel = kernels<T, S>();
  const int64_t N = ragged.N();
  const at::Tensor y = lacks_output(call.y)
                           ? output_again<Stored<T>, R>(s, ragged, weights, cells, reserve, kernel.width)
                           : call.y.contiguous();
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  const ThreadPartition& threads = plan.partition;
  const bool pack = plan.pack_hh;
  const int64_t chunk = plan.chunk_steps;
  const int64_t ld = kernel.padded_columns(P);
  const int64_t packed_size = pack ? kernel.columns_packed_size(4 * H, P) : 0;
  const OptionalTensor dy = contiguous(call.dy), dcells = contiguous(call.dcells), h0 = contiguous(call.h0);
  const at::Tensor y_real = to_real<T>(y);
  const OptionalTensor h0_real = h0 ? OptionalTensor(to_real<T>(*h0)) : h0;

  const auto need_hr = [&](int64_t d) { return s.proj() && needs[3 + (d + 1) * s.per_direction - 1]; };
  const auto of_panels = [](int64_t n) { return (n * int64_t(sizeof(S)) + 3) / int64_t(sizeof(R)); };
  Workspace<R> space;
  PerDirection dh_at, dc_at, c0_at, packed_at, hr_at, dgates_at, dr_at, hidden_at;
  for (int64_t d = 0; d < D; ++d) {
    dh_at[d] = space.take(B * ld);
    dc_at[d] = space.take(B * H);
    c0_at[d] = space.take(B * H);
    packed_at[d] = space.take(of_panels(threads.copies * packed_size));
    hr_at[d] = space.take(s.proj() ? of_panels(kernel.columns_packed_size(P, H)) : 0);
    dgates_at[d] = space.take(chunk * B * 4 * H);
    dr_at[d] = space.take(s.proj() ? chunk * B * P : 0);
    hidden_at[d] = space.take(need_hr(d) ? chunk * B * H : 0);
  }
  const int64_t scratch_at = space.take(threads.threads() * kernel.backward_scratch(H, P));
  space.allocate(real_like<T>(x));
  const auto panels = [&](int64_t at) { return reinterpret_cast<S*>(space.at(at)); };

  const auto pack_hh = [&](const BackwardArgs<T, S>& a, int64_t begin, int64_t end) {
    kernel.pack_columns(a.w_hh, 4 * H, P, 1, begin, end, a.packed);
  };
  std::vector<BackwardArgs<T, S>> args;
  std::vector<at::Tensor> hold;
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights w(s, weights, d);
    hold.push_back(w.hh.contiguous());
    const T* w_hh = data_of<T>(hold.back());
    gather_state<T>(contiguous(call.dh_n), d, rows[d], P, space.at(dh_at[d]), ld);
    gather_state<T>(contiguous(call.dc_n), d, rows[d], H, space.at(dc_at[d]), H);
    gather_state<T>(contiguous(call.c0), d, rows[d], H, space.at(c0_at[d]), H);
    if (s.proj()) pack_columns<T>(threads.threads(), w.hr, panels(hr_at[d]));
    args.push_back({rows[d],
                    H,
                    P,
                    d == 1,
                    0,
                    0,
                    0,
                    data_of<T>(reserve) + d * s.rows() * 4 * H,
                    data_of<T>(cells) + d * H,
                    space.at(c0_at[d]),
                    dy ? data_of<T>(*dy) + d * P : nullptr,
                    dcells ? data_of<T>(*dcells) + d * H : nullptr,
                    D * H,
                    D * P,
                    D * H,
                    w_hh,
                    pack ? panels(packed_at[d]) : nullptr,
                    s.proj() ? panels(hr_at[d]) : nullptr,
                    space.at(dgates_at[d]),
                    s.proj() ? space.at(dr_at[d]) : nullptr,
                    need_hr(d) ? space.at(hidden_at[d]) : nullptr,
                    space.at(dh_at[d]),
                    space.at(dc_at[d]),
                    space.at(scratch_at)});
    if (pack && !threads.private_weights())
      for_blocks(threads.threads(), P, kernel.unit_block, 4 * H * kernel.unit_block,
                 [&](int64_t begin, int64_t end) { pack_hh(args[d], begin, end); });
  }
  const auto wanted = [&](int64_t i, at::IntArrayRef sizes) {
    return needs[i] ? new_empty(sizes, x) : none();
  };
  std::vector<WeightGradient> gradients;
  bool need_input = false;
  for (size_t k = 0; k < weights.size(); ++k) {
    dweights.push_back(wanted(3 + k, weights[k].sizes()));
    const int64_t of = static_cast<int64_t>(k) % s.per_direction;
    gradients.emplace_back(dweights[k], of == 0 ? plan.dw_ih : of == 1 ? plan.dw_hh : plan.dw_hr);
    need_input |= needs[3 + k] && k % s.per_direction == 0;
  }
  const at::Tensor input = need_input ? to_real<T>(packed_input<Stored<T>>(x, s, ragged)) : at::Tensor();
  // Both directions add to dx, each from its own end.
  const std::vector<int64_t> sizes = ragged.padded() ? std::vector{N, s.I} : x.sizes().vec();
  const at::Tensor like = real_like<T>(x);
  const at::Tensor dx_rows = !needs[0] ? none() : D == 1 ? new_empty(sizes, like) : new_zeros(sizes, like);
  std::vector<at::Tensor> w_ih, states(D);
  std::vector<bool> identity;
  for (int64_t d = 0; d < D; ++d) {
    const int64_t at = d * s.per_direction;
    w_ih.push_back(weights[at].contiguous());
    identity.push_back(needs[0] && is_identity<T>(w_ih[d], s, d));
    if (needs[3 + at + 1] && !ragged.plain()) states[d] = entering_states<R>(y_real, h0_real, s, ragged, d);
  }

  std::vector<char> is_packed(D * threads.copies, 0);
  for (int64_t end = s.T; end > 0; end -= std::min(end, chunk)) {
    const int64_t first = std::max<int64_t>(0, end - chunk);
    const bool add = end < s.T;
    for (int64_t d = 0; d < D; ++d) {
      args[d].first = first;
      args[d].steps = end - first;
      args[d].base = Span(s, ragged, d, first, end - first).begin;
      if (identity[d] && D == 1) args[d].dgates = dx_rows.mutable_data_ptr<R>() + args[d].base * s.I;
    }
    run_partition(threads, rows, H, P, kernel.unit_block, [&](int64_t d, const Member& me) {
      BackwardArgs<T, S> mine = args[d];
      if (pack) mine.packed += threads.copy(me.index) * packed_size;
      // Once for all steps; a copy when its thread first runs, which may have been missing before.
      bool packed = add;
      if (threads.copies > 1) {
        char& copy = is_packed[d * threads.copies + threads.copy(me.index)];
        packed = copy, copy = 1;
      }
      if (pack && threads.private_weights() && !packed) pack_hh(mine, me.feature_begin, me.feature_end);
      kernel.backward(mine, me);
    });
    for (int64_t d = 0; d < D; ++d) {
      const Span span(s, ragged, d, first, end - first);
      const int64_t at = d * s.per_direction, n = span.rows();
      const R* dgates = args[d].dgates;
      const auto need = [&](int64_t k) { return needs[3 + at + k]; };
      if (needs[0] && n > 0) {
        R* dx = dx_rows.mutable_data_ptr<R>() + span.begin * s.I;
        if (identity[d] && D == 2)  // with one direction dgates lies in dx
          for (int64_t r = 0; r < n; ++r)
            for (int64_t k = 0; k < 4 * H; ++k) dx[r * s.I + d * 4 * H + k] += dgates[r * 4 * H + k];
        else if (!identity[d])
          multiply<R, T>(
              {n, s.I, 4 * H, dgates, 4 * H, false, data_of<T>(w_ih[d]), s.I, D > 1, dx, s.I, nullptr});
      }
      if (need(0)) gradients[at].add(n, dgates, input.const_data_ptr<R>() + span.begin * s.I, s.I, add);
      if (need(1) && ragged.plain())
        recurrent_gradient<R>(span, dgates, y_real, h0_real, s, d, add, gradients[at + 1]);
      else if (need(1))
        gradients[at + 1].add(n, dgates, states[d].const_data_ptr<R>() + span.begin * P, P, add);
      if (s.bias && (need(2) || need(3)))
        bias_gradient<R>(n, dgates, add, gradients[at + (need(2) ? 2 : 3)].sum());
      if (need_hr(d)) gradients[at + s.per_direction - 1].add(n, args[d].dr, args[d].hidden, H, add);
    }
  }
  for (WeightGradient& gradient : gradients) gradient.finish();
  for (int64_t at = 0; s.bias && at < D * s.per_direction; at += s.per_direction)
    if (needs[3 + at + 2] && needs[3 + at + 3])
      std::copy_n(data_of<T>(dweights[at + 2]), 4 * H, writable<T>(dweights[at + 3]));

  at::Tensor dx = !needs[0] || ragged.padded() ? dx_rows : from_real<T>(dx_rows);
  if (needs[0] && ragged.padded()) {
    dx = new_zeros(x.sizes(), x);
    const R* from = dx_rows.const_data_ptr<R>();
    T* to = writable<T>(dx);
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
      copy_numbers(from + packed_row * s.I, s.I, to + row * s.I);
    });
  }
  const auto state_gradient = [&](bool need, const PerDirection& at, int64_t n, int64_t stride) {
    if (!need) return none();
    at::Tensor grad = new_empty({D, B, n}, x);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t r = 0; r < B; ++r)
        copy_numbers(space.at(at[d]) + r * stride, n,
                     writable<T>(grad) + (d * B + rows[d].batch_row_at(r)) * n);
    return grad;
  };
  const at::Tensor dh0 = state_gradient(needs[1], dh_at, P, ld), dc0 = state_gradient(needs[2], dc_at, H, H);
  return {dx, dh0, dc0, dweights};
}

}  // namespace

template <class T>
LayerGradients backward(const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                        const OptionalTensor& dcells, const at::Tensor& x, const OptionalTensor& h0,
                        const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& lengths,
                        const OptionalTensor& reset_mask, const at::Tensor& y, const at::Tensor& cells_in,
                        const at::Tensor& reserve_in, const c10::List<bool>& needs) {
  const LayerSizes s(x, weights, lengths);
  // A saved-tensor hook may give back other strides.
  const at::Tensor cells = cells_in.contiguous(), reserve = reserve_in.contiguous();
  s.check_inputs(x, h0, c0, lengths, reset_mask);
  s.check_backward(x, dy, dh_n, dc_n, dcells, y, cells, reserve, needs);
  if (s.rows() == 0) {
    const auto zeros = [&](int64_t i, at::IntArrayRef sizes) {
      return needs[i] ? at::zeros(sizes, x.options()) : new_empty({0}, x);
    };
    std::vector<at::Tensor> dweights;
    for (size_t k = 0; k < weights.size(); ++k) dweights.push_back(zeros(3 + k, weights[k].sizes()));
    return {zeros(0, x.sizes()), zeros(1, {s.D, s.B, s.P}), zeros(2, {s.D, s.B, s.H}), dweights};
  }
  const Ragged ragged(s, lengths, reset_mask);
  const BackwardPlan plan = plan_backward(layer_shape<T>(s, ragged, h0), this_machine());
  const BackwardCall call{s, ragged, dy, dh_n, dc_n, dcells, x, h0, c0, weights, y, cells, reserve, needs};
  if constexpr (std::is_same_v<T, Bf16>) {
    if (plan.driver == Driver::bf16_products) return backward_bf16(call, plan);
    if (plan.driver == Driver::bf16_panels) return backward_on<T, PanelBf16>(call, plan);
  }
  return backward_on<T, Real<T>>(call, plan);
}

#define FASTLSTM_INSTANTIATE(T)                                                                            \
  template LayerGradients backward<T>(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, \
                                      const OptionalTensor&, const at::Tensor&, const OptionalTensor&,     \
                                      const OptionalTensor&, at::TensorList, const OptionalTensor&,        \
                                      const OptionalTensor&, const at::Tensor&, const at::Tensor&,         \
                                      const at::Tensor&, const c10::List<bool>&);
FASTLSTM_INSTANTIATE(float)
FASTLSTM_INSTANTIATE(double)
FASTLSTM_INSTANTIATE(Bf16)
#undef FASTLSTM_INSTANTIATE

}  // namespace fastlstm
