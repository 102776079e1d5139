// Backward: per step one cell kernel and one GEMM dgates W_hh, each for both directions, or one persistent
// kernel for a chunk of steps; then one GEMM each for dx, dW_ih, dW_hh and dW_hr, and one sum for the biases.
// Saved tensors are only read, so backward may run again.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cell.h"
#include "cuda/device.h"
#include "cuda/layer_persistent.h"
#include "cuda/products.h"

namespace fastlstm::cuda {
namespace {

// Accumulates the gradient of a weight, in the accumulation dtype if there are several terms.
class GradientSum {
 public:
  GradientSum() = default;
  GradientSum(const Layer& l, at::IntArrayRef shape, bool several)
      : layer_(&l), shape_(shape.vec()), options_(several ? l.sum_options : l.options) {}
  bool needed() const { return layer_ != nullptr; }

  void add(const Gemm& gemm, const at::Tensor& a, const at::Tensor& b) {
    if (total_.defined() && total_.dtype() == a.dtype()) return gemm(total_, a, b, true);
    at::Tensor product = at::empty(shape_, options_);
    gemm(product, a, b);
    add(product);
  }
  void add(const at::Tensor& term) {
    if (total_.defined()) {
      total_.add_(term);
    } else {
      total_ = term;
    }
  }
  at::Tensor result() const {
    return total_.defined() ? total_.to(layer_->dtype) : at::zeros(shape_, layer_->options);
  }

 private:
  const Layer* layer_ = nullptr;
  std::vector<int64_t> shape_;
  at::TensorOptions options_;
  at::Tensor total_;
};

struct DirectionSums {
  // Those needed. vectors: of a bias [4H]; with layer normalization [14H], the sums of
  // BackwardStep::norm_terms
  GradientSum ih, hh, vectors, hr;
};

struct BackwardInputs {
  at::Tensor dy, dh_n, dc_n, dcells;  // undefined for zeros
  at::Tensor x, y, cells, reserve;
  bool wants_dgates;  // as dx
};

// Consecutive steps of one direction, and their gradients.
struct Chunk {
  int64_t d, begin, count;
  at::Tensor dgates;      // [count * B, 4H]
  at::Tensor dgates_x;    // [count * B, 4H]   of x W_ih^T: dgates without layer normalization
  at::Tensor norm_terms;  // [count * B, 14H]  with layer normalization
  at::Tensor dprojected;  // [count * B, P]  with projection: the gradient of h
  at::Tensor hidden;      // [count * B, H]  with projection, if dW_hr is needed: o * tanh(c)
};

// [count * B, n]: a chunk's rows of `source` [T, B, n], or the previous states of its steps times `mask`;
// zero where a row lacks the step, since padding may hold NaN and 0 * NaN is NaN.
template <class T>
at::Tensor ragged_rows(const Layer& l, const Chunk& chunk, const at::Tensor& source, bool previous,
                       const at::Tensor& initial, const at::Tensor& mask, cudaStream_t stream) {
  const int64_t n = source.size(2);
  const at::Tensor rows = at::empty({chunk.count * l.B, n}, l.options);
  check(launch_ragged_rows<T>(
      {l.steps, chunk.begin, chunk.count, n, static_cast<int>(chunk.d), previous, in<T>(source),
       source.stride(0), source.stride(1), in<T>(initial), out<T>(rows), mask_view(mask)},
      stream));
  return rows;
}

// dW_hh of a dense batch: h_prev of step t is y[t - 1], in reverse y[t + 1], and h0 at a direction's first
// step.
void add_recurrent(const Layer& l, const Gemm& gemm, const Chunk& chunk, const at::Tensor& y,
                   const at::Tensor& h0, GradientSum& sum) {
  const int64_t first = chunk.d == 0 ? 0 : l.T - 1;
  const bool has_first = chunk.begin <= first && first < chunk.begin + chunk.count;
  const int64_t skip = has_first && chunk.d == 0, with_prev = chunk.count - has_first;
  if (with_prev > 0) {
    const at::Tensor h = y.narrow(0, chunk.begin + skip + (chunk.d == 0 ? -1 : 1), with_prev).flatten(0, 1);
    sum.add(gemm, chunk.dgates.narrow(0, skip * l.B, with_prev * l.B).t(), h);
  }
  if (has_first && h0.defined()) {
    sum.add(gemm, chunk.dgates.narrow(0, (first - chunk.begin) * l.B, l.B).t(), h0);
  }
}

// Column sums of a tall matrix [n, m], in runs of kSumRunRows rows.
at::Tensor column_sums(const at::Tensor& rows, at::ScalarType dtype) {
  const int64_t n = rows.size(0), runs = n / kSumRunRows, whole = runs * kSumRunRows;
  if (runs < 2) return at::sum(rows, {0}, false, dtype);
  at::Tensor sums =
      at::sum(rows.narrow(0, 0, whole).view({runs, kSumRunRows, rows.size(1)}), {1}, false, dtype).sum(0);
  if (whole < n) sums.add_(at::sum(rows.narrow(0, whole, n - whole), {0}, false, dtype));
  return sums;
}

// Adds a chunk's terms to the gradients of x and of the weights.
template <class T>
void add_chunk(const Layer& l, const Gemm& gemm, const BackwardInputs& inputs, const Chunk& chunk,
               const at::Tensor& dx, bool add_dx, DirectionSums& sums, cudaStream_t stream) {
  const int64_t rows = chunk.count * l.B;
  if (dx.defined()) {
    at::Tensor part = dx.narrow(0, chunk.begin, chunk.count).view({rows, dx.size(2)});
    if (inputs.wants_dgates)
      part.narrow(1, chunk.d * 4 * l.H, 4 * l.H).copy_(chunk.dgates_x);
    else
      gemm(part, chunk.dgates_x, l.weights[chunk.d].ih, add_dx);
  }
  const at::Tensor dgates_t = chunk.dgates.t();
  if (sums.ih.needed()) {
    sums.ih.add(gemm, chunk.dgates_x.t(),
                l.lengths.defined() ? ragged_rows<T>(l, chunk, inputs.x, false, {}, {}, stream)
                                    : inputs.x.narrow(0, chunk.begin, chunk.count).reshape({rows, l.I}));
  }
  if (sums.hh.needed()) {
    const at::Tensor y = inputs.y.narrow(2, chunk.d * l.P, l.P);  // [T, B, P]
    const at::Tensor h0 = l.h0.defined() ? l.h0.select(0, chunk.d) : at::Tensor();
    if (l.ragged() || l.recurrent_mask.defined()) {
      sums.hh.add(gemm, dgates_t, ragged_rows<T>(l, chunk, y, true, h0, l.recurrent_mask, stream));
    } else {
      add_recurrent(l, gemm, chunk, y, h0, sums.hh);
    }
  }
  if (sums.vectors.needed())
    sums.vectors.add(column_sums(l.norm ? chunk.norm_terms : chunk.dgates, l.sum_dtype));
  if (sums.hr.needed()) sums.hr.add(gemm, chunk.dprojected.t(), chunk.hidden);
}

template <class T>
struct Pass {
  const Layer& l;
  const BackwardInputs& inputs;
  const int64_t slots;  // steps in a chunk
  const bool need_dh0;
  const cudaStream_t stream;

  // Adds to the sums and fills dx if defined. Returns dh0 (if needed) and dc0, which has the accumulation
  // dtype.
  std::pair<at::Tensor, at::Tensor> run(const at::Tensor& dx, std::vector<DirectionSums>& sums) const;
};

template <class T>
std::pair<at::Tensor, at::Tensor> Pass<T>::run(const at::Tensor& dx, std::vector<DirectionSums>& sums) const {
  const Gemm gemm(l.dtype);
  const int64_t B = l.B, H = l.H, P = l.P;
  const int D = static_cast<int>(l.D);
  PersistentPass<T> persistent(l, Phase::backward, gemm.tf32(), stream);
  const at::Tensor dgates = at::empty({D, slots, B, 4 * H}, l.options);
  const at::Tensor dgates_x = l.norm ? at::empty_like(dgates) : dgates;
  const at::Tensor norm_terms =
      l.norm ? at::empty({D, slots, B, NormTerms::kSize * H}, l.sum_options) : at::Tensor();
  const at::Tensor dc = at::empty({D, B, H}, l.sum_options);
  at::Tensor dh, dh_all, dhidden, dhidden_all, dprojected, hidden, carry, w_hh, w_hr;
  if (l.T > 1 || need_dh0) {
    dh = at::empty({D, B, P}, l.sum_options), dh_all = l.batched_operand(dh);
  }
  if (l.lengths.defined() || l.zoneout_h.defined()) carry = at::empty({D, B, P}, l.sum_options);
  if (l.proj()) {
    dhidden = at::empty({D, B, H}, l.sum_options), dhidden_all = l.batched_operand(dhidden);
    dprojected = at::empty({D, slots, B, P}, l.options);
    w_hr = l.stacked(&DirectionWeights::hr);
    const bool hr_needed = std::any_of(sums.begin(), sums.end(), [](const auto& s) { return s.hr.needed(); });
    if (hr_needed) hidden = at::empty({D, slots, B, H}, l.options);
  }
  SlotView dgates_view(dgates), dprojected_view(l.proj() ? dprojected : dgates);

  HiddenGradient<T> gradient = {P,
                                in<T>(inputs.dy),
                                0,
                                0,
                                in<T>(inputs.dh_n),
                                in<Acc<T>>(dh),
                                out<Acc<T>>(carry),
                                mask_view(l.recurrent_mask),
                                mask_view(l.zoneout_h)};
  if (inputs.dy.defined()) gradient.dy_t = inputs.dy.stride(0), gradient.dy_b = inputs.dy.stride(1);
  BackwardStep<T> step = {};
  step.steps = l.steps, step.H = H, step.D = D, step.gradient = gradient;
  step.dhidden = in<Acc<T>>(dhidden);
  step.gates = in<T>(inputs.reserve), step.cells = in<T>(inputs.cells), step.c0 = in<T>(l.c0);
  step.dcells = in<T>(inputs.dcells);
  if (inputs.dcells.defined())
    step.dcells_t = inputs.dcells.stride(0), step.dcells_b = inputs.dcells.stride(1);
  step.dc_n = in<T>(inputs.dc_n), step.dc = out<Acc<T>>(dc);
  step.dgates = out<T>(dgates), step.hidden = out<T>(hidden), step.slots = slots;
  step.zoneout = mask_view(l.zoneout_c);
  for (int d = 0; d < D; ++d) step.norm[d] = norm_weights<T>(l.weights[d]);
  step.dgates_x = out<T>(dgates_x), step.norm_terms = out<Acc<T>>(norm_terms);
  ProjectedGradient<T> project = {l.steps, D, true, {}, gradient, out<T>(dprojected), slots, {}};

  // The second direction adds to the first's dx. With chunks they reach its rows at different times, so both
  // add.
  const bool both_add = D == 2 && slots < l.T;
  if (dx.defined() && both_add) dx.zero_();
  int64_t begin[2] = {}, count = 0;
  for (int64_t s = 0; s < l.T; ++s) {
    if (s % slots == 0) {
      count = std::min(slots, l.T - s);
      begin[0] = l.T - s - count, begin[1] = s;
    }
    const bool dh_needed = s + count < l.T || need_dh0;
    if (persistent && persistent.backward(step, s, count, begin, dh_needed ? out<Acc<T>>(dh) : nullptr)) {
      s += count - 1;
    } else {
      if (dh.defined() && !w_hh.defined()) w_hh = l.stacked(&DirectionWeights::hh);
      step.first = project.first = s == 0;
      for (int d = 0; d < 2; ++d) {
        step.t[d] = project.t[d] = d == 0 ? l.T - 1 - s : s;
        step.slot[d] = project.slot[d] = step.t[d] - begin[d];
      }
      if (l.proj()) {
        check(launch_projection_step_bwd(project, stream));
        gemm(dhidden_all, dprojected_view.at(project.slot), w_hr);
      }
      check(launch_cell_step_bwd(step, stream));
      if (s + 1 < l.T || need_dh0) gemm(dh_all, dgates_view.at(step.slot), w_hh);
    }
    if (s + 1 < l.T && (s + 1) % slots != 0) continue;
    const auto rows = [&](const at::Tensor& all, int64_t d) {
      return all.defined() ? all.select(0, d).narrow(0, 0, count).flatten(0, 1) : at::Tensor();
    };
    for (int64_t d = 0; d < D; ++d) {
      const Chunk chunk = {d,
                           begin[d],
                           count,
                           rows(dgates, d),
                           rows(dgates_x, d),
                           rows(norm_terms, d),
                           rows(dprojected, d),
                           rows(hidden, d)};
      add_chunk<T>(l, gemm, inputs, chunk, dx, both_add || d == 1, sums[d], stream);
    }
  }
  at::Tensor dh0;
  if (need_dh0) {
    dh0 = at::empty({D, B, P}, l.options);
    check(launch_initial_state_bwd<T>({l.steps, D, gradient, out<T>(dh0)}, stream));
  }
  return {dh0, dc};
}

// Returns the gradient with a last stride of 1; undefined if there is none.
at::Tensor unit_stride(const OptionalTensor& gradient) {
  if (!gradient || !gradient->defined()) return {};
  return gradient->stride(-1) == 1 ? *gradient : gradient->contiguous();
}

// y [T, B, D*P] from each direction's h before the zoneout [T, B, P], step by step.
template <class T>
at::Tensor zoned_output(const Layer& l, const std::vector<at::Tensor>& directions, cudaStream_t stream) {
  const at::Tensor y = at::empty({l.T, l.B, l.D * l.P}, l.options);
  const at::Tensor h = at::empty({l.D, l.B, l.P}, l.options), h_n = at::empty_like(h);
  const at::Tensor unmasked_h = at::empty({l.D, l.B, l.P}, l.sum_options), now = at::empty_like(unmasked_h);
  const HiddenState<T> state = {
      l.P, in<T>(l.h0), out<T>(h), out<T>(y), nullptr, out<Acc<T>>(unmasked_h), {}, mask_view(l.zoneout_h)};
  ProjectedStep<T> step = {l.steps, static_cast<int>(l.D), true, {}, in<Acc<T>>(now), state};
  for (int64_t s = 0; s < l.T; ++s) {
    step.first = s == 0;
    for (int64_t d = 0; d < l.D; ++d) {
      step.t[d] = d == 0 ? s : l.T - 1 - s;
      now.select(0, d).copy_(directions[d].select(0, step.t[d]));
    }
    if (s == l.T - 1) step.state.h_n = out<T>(h_n);
    check(launch_projection_step_fwd(step, stream));
  }
  return y;
}

// Recomputes y from the saved gates and cells: h = o * tanh(c), with c before its zoneout, its projection,
// and the zoneout of h. The results of rows past a length are undefined.
template <class T>
at::Tensor recompute_output(const Layer& l, const at::Tensor& cells, const at::Tensor& reserve,
                            cudaStream_t stream) {
  std::vector<at::Tensor> directions;
  for (int64_t d = 0; d < l.D; ++d) {
    const auto gate = [&](int64_t g) { return reserve.select(0, d).narrow(2, g * l.H, l.H).to(l.sum_dtype); };
    at::Tensor c = cells.narrow(2, d * l.H, l.H);
    if (l.zoneout_c.defined()) {
      const at::Tensor c0 = l.c0.defined() ? l.c0.select(0, d) : at::Tensor();
      const at::Tensor c_prev = ragged_rows<T>(l, {d, 0, l.T}, c, true, c0, {}, stream);
      c = gate(1).mul(c_prev.view({l.T, l.B, l.H})).add_(gate(0).mul(gate(2)));
    }
    c = c.to(l.sum_dtype);
    if (l.norm) {
      const auto& w = l.weights[d].norm;
      c = at::layer_norm(c, {l.H}, w[4].to(l.sum_dtype), w[5].to(l.sum_dtype), kNormEpsilon);
    }
    const at::Tensor h = gate(3).mul(c.tanh()).to(l.dtype);
    directions.push_back(l.proj() ? h.matmul(l.weights[d].hr.t()) : h);
  }
  return l.zoneout_h.defined() ? zoned_output<T>(l, directions, stream) : at::cat(directions, -1);
}

}  // namespace

LayerGradients layer_backward(const ResultGradients& grads, const LayerInputs& in, const SavedResults& saved,
                              const c10::List<bool>& needs) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::Tensor& x = in.x;
  const DeviceGuard device(x);
  const Layer l(in);
  const int64_t T = l.T, B = l.B, H = l.H, P = l.P;
  l.check_backward(x, grads, saved, needs);
  const auto dense = [](const at::Tensor& t) { return t.defined() ? t.contiguous() : t; };
  bool reads_x = false;
  for (int64_t d = 0; d < l.D; ++d) reads_x |= needs[3 + d * l.per_direction];
  BackwardInputs inputs = {unit_stride(grads.dy),
                           dense(unit_stride(grads.dh_n)),
                           dense(unit_stride(grads.dc_n)),
                           unit_stride(grads.dcells),
                           reads_x && l.lengths.defined() && x.stride(2) != 1 ? x.contiguous() : x,
                           dense(saved.y),
                           dense(saved.cells),
                           dense(saved.reserve),
                           l.wants_dgates(needs)};

  const int64_t step_bytes = std::max<int64_t>(1, l.D * B * 4 * H * static_cast<int64_t>(x.element_size()));
  const int64_t slots = std::clamp<int64_t>(
      std::max(kDgatesChunkMinBytes, step_bytes * T / kDgatesMaxChunks) / step_bytes, 1, T);
  const auto need = [&](int64_t d, int64_t k) { return needs[3 + d * l.per_direction + k]; };
  const int64_t hr = l.per_direction - 1;  // index of weight_hr
  std::vector<DirectionSums> sums(l.D);
  for (int64_t d = 0; d < l.D; ++d) {
    const bool several = slots < T;
    if (need(d, 0)) sums[d].ih = GradientSum(l, {4 * H, l.I}, several);
    if (need(d, 1)) sums[d].hh = GradientSum(l, {4 * H, P}, several || l.h0.defined());
    bool vectors = false;
    for (int64_t k = 2; k < l.per_direction - l.proj(); ++k) vectors |= need(d, k);
    if (vectors) sums[d].vectors = GradientSum(l, {(l.norm ? NormTerms::kSize : 4) * H}, true);
    if (l.proj() && need(d, hr)) sums[d].hr = GradientSum(l, {P, H}, several);
  }
  at::Tensor dx, dh0, dc0;
  if (needs[0]) dx = at::empty(l.per_row(l.dx_features(needs)), l.options);
  if (B > 0) {
    for_dtype(l.dtype, [&](auto* type) {
      using Type = std::remove_pointer_t<decltype(type)>;
      if (lacks_output(saved.y))
        inputs.y = recompute_output<Type>(l, inputs.cells, inputs.reserve, device.stream());
      std::tie(dh0, dc0) = Pass<Type>{l, inputs, slots, needs[1], device.stream()}.run(dx, sums);
    });
  } else {
    dh0 = at::empty({l.D, B, P}, l.options), dc0 = at::empty({l.D, B, H}, l.options);
  }

  std::vector<at::Tensor> dweights(in.weights.size());
  for (int64_t d = 0; d < l.D; ++d) {
    at::Tensor* const dw = &dweights[d * l.per_direction];
    if (sums[d].ih.needed()) dw[0] = sums[d].ih.result();
    if (sums[d].hh.needed()) dw[1] = sums[d].hh.result();
    if (sums[d].vectors.needed()) {
      const at::Tensor found = sums[d].vectors.result();
      // Equal gradients must not alias.
      const auto give = [&](int64_t k, int64_t begin, int64_t n) {
        if (need(d, k)) dw[k] = found.narrow(0, begin * H, n * H).clone();
      };
      if (l.norm) {
        for (int64_t bias = 2; bias < l.first_norm(); ++bias) give(bias, NormTerms::kBiases, 4);
        for (int64_t k = 0; k < kNormWeights; ++k)
          give(l.first_norm() + k, NormTerms::of_weight(k), k < 4 ? 4 : 1);
      } else {
        if (need(d, 2)) dw[2] = found;
        if (need(d, 3)) dw[3] = need(d, 2) ? found.clone() : found;
      }
    }
    if (sums[d].hr.needed()) dw[hr] = sums[d].hr.result();
  }
  const auto or_none = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, l.options); };
  for (at::Tensor& dw : dweights) dw = or_none(dw);
  return {or_none(dx), needs[1] ? dh0 : or_none({}), needs[2] ? dc0.to(l.dtype) : or_none({}), dweights};
}

}  // namespace fastlstm::cuda
