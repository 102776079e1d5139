// Backward: for every step one cell kernel and one product dgates W_hh, each for both directions; then one
// product each for dx, dW_ih, dW_hh and dW_hr and one sum for the biases. What forward saved is only read, so
// it may run again.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "cuda/device.h"
#include "cuda/layer.h"
#include "cuda/products.h"

namespace fastlstm::cuda {
namespace {

// dgates [T, B, 4H] is as large as the reserve, so long sequences go in chunks of a quarter; the products
// after the loop are then as many sums. Below this size it is not worth while.
constexpr int64_t kChunkBytes = 64 << 20;

// A weight's gradient: a sum of products, kept in the accumulation type where they are several.
class Sum {
 public:
  Sum() = default;
  Sum(const Layer& l, at::IntArrayRef shape, bool several)
      : l_(&l), shape_(shape.vec()), kept_(several ? l.accumulated : l.options) {}
  explicit operator bool() const { return l_ != nullptr; }

  void add(const Products& multiply, const at::Tensor& a, const at::Tensor& b) {
    const bool more = total_.defined();
    if (more && kept_.dtype() == a.dtype()) return multiply(total_, a, b, true);
    at::Tensor product = at::empty(shape_, kept_);
    multiply(product, a, b);
    add(product);
  }
  void add(const at::Tensor& term) { total_.defined() ? void(total_.add_(term)) : void(total_ = term); }
  at::Tensor result() const {
    return total_.defined() ? total_.to(l_->options.dtype()) : at::zeros(shape_, l_->options);
  }

 private:
  const Layer* l_ = nullptr;
  std::vector<int64_t> shape_;
  at::TensorOptions kept_;
  at::Tensor total_;
};

struct Gradients {
  at::Tensor dx, dh0, dc0;
  std::array<Sum, 2> ih, hh, bias, hr;  // by direction; empty where not needed
};

struct Inputs {
  at::Tensor dy, dh_n, dc_n, dcells;  // undefined for zero
  at::Tensor x, h0, c0, y, cells, reserve;
};

// [count * B, n]: the rows of `source` [T, B, n], or the states that enter these steps, zero where a row
// lacks the step.
template <class T>
at::Tensor ragged_rows(const Layer& l, const at::Tensor& source, int64_t begin, int64_t count, int d,
                       bool entering, const at::Tensor& initial, cudaStream_t stream) {
  const int64_t n = source.size(2);
  const at::Tensor rows = at::empty({count * l.B, n}, l.options);
  check(launch_ragged_rows<T>({l.steps, begin, count, n, d, entering, in<T>(source), source.stride(0),
                               source.stride(1), in<T>(initial), out<T>(rows)},
                              stream));
  return rows;
}

// What the steps begin ... begin + count - 1 of direction d add to the gradients. dgates [count * B, 4H],
// dprojected [count * B, P] and hidden [count * B, H] are theirs.
template <class T>
void add_chunk(const Layer& l, const Products& multiply, const Inputs& in, Gradients& g, int d, int64_t begin,
               int64_t count, const at::Tensor& dgates, const at::Tensor& dprojected,
               const at::Tensor& hidden, bool dx_begun, cudaStream_t stream) {
  const int64_t B = l.B, P = l.P;
  if (g.dx.defined()) {
    at::Tensor dx = g.dx.narrow(0, begin, count).view({count * B, l.I});
    multiply(dx, dgates, l.weights[d].ih, dx_begun);
  }
  if (g.ih[d]) {
    g.ih[d].add(multiply, dgates.t(),
                l.lengths.defined() ? ragged_rows<T>(l, in.x, begin, count, d, false, {}, stream)
                                    : in.x.narrow(0, begin, count).reshape({count * B, l.I}));
  }
  const at::Tensor y = in.y.narrow(2, d * P, P);  // [T, B, P]
  const at::Tensor h0 = in.h0.defined() ? in.h0.select(0, d) : at::Tensor();
  if (g.hh[d] && l.ragged()) {
    g.hh[d].add(multiply, dgates.t(), ragged_rows<T>(l, y, begin, count, d, true, h0, stream));
  } else if (g.hh[d]) {
    // Step t was entered with y[t - 1], in reverse y[t + 1]; the direction's first with h0.
    const int64_t first = d == 0 ? 0 : l.T - 1;
    const bool has_first = begin <= first && first < begin + count;
    const int64_t skip = has_first && d == 0, entered = count - has_first;
    if (entered > 0) {
      const at::Tensor h = y.narrow(0, begin + skip + (d == 0 ? -1 : 1), entered).flatten(0, 1);
      g.hh[d].add(multiply, dgates.narrow(0, skip * B, entered * B).t(), h);
    }
    if (has_first && h0.defined()) g.hh[d].add(multiply, dgates.narrow(0, (first - begin) * B, B).t(), h0);
  }
  if (g.bias[d]) g.bias[d].add(at::sum(dgates, {0}, false, l.accumulated.dtype().toScalarType()));
  if (g.hr[d]) g.hr[d].add(multiply, dprojected.t(), hidden);
}

template <class T>
void run(const Layer& l, const Inputs& given, Gradients& g, bool need_dh0, int64_t slots,
         cudaStream_t stream) {
  const Products multiply(l.options.dtype().toScalarType());
  const int64_t B = l.B, H = l.H, P = l.P;
  const at::Tensor dgates = at::empty({l.D, slots, B, 4 * H}, l.options);
  const at::Tensor dc = at::empty({l.D, B, H}, l.accumulated);
  at::Tensor dh, dhidden, dprojected, hidden, carry, w_hh, w_hr, dh_all, dhidden_all;
  if (l.T > 1 || need_dh0) {
    dh = at::empty({l.D, B, P}, l.accumulated);
    dh_all = l.per_product(dh);
    w_hh = l.stacked(&DirectionWeights::hh);
  }
  if (l.lengths.defined()) carry = at::empty({l.D, B, P}, l.accumulated);
  if (l.projected) {
    dhidden = at::empty({l.D, B, H}, l.accumulated);
    dhidden_all = l.per_product(dhidden);
    dprojected = at::empty({l.D, slots, B, P}, l.options);
    w_hr = l.stacked(&DirectionWeights::hr);
    if (g.hr[0] || g.hr[1]) hidden = at::empty({l.D, slots, B, H}, l.options);
  }
  SlotView dgates_at(dgates), dprojected_at(l.projected ? dprojected : dgates);

  HiddenGradient<T> gradient = {
      P, in<T>(given.dy), 0, 0, in<T>(given.dh_n), in<Acc<T>>(dh), out<Acc<T>>(carry)};
  if (given.dy.defined()) gradient.dy_t = given.dy.stride(0), gradient.dy_b = given.dy.stride(1);
  BackwardStep<T> step = {};
  step.steps = l.steps, step.H = H, step.D = l.D, step.gradient = gradient;
  step.dhidden = in<Acc<T>>(dhidden);
  step.gates = in<T>(given.reserve), step.cells = in<T>(given.cells), step.c0 = in<T>(given.c0);
  step.dcells = in<T>(given.dcells);
  if (given.dcells.defined()) step.dcells_t = given.dcells.stride(0), step.dcells_b = given.dcells.stride(1);
  step.dc_n = in<T>(given.dc_n), step.dc = out<Acc<T>>(dc);
  step.dgates = out<T>(dgates), step.hidden = out<T>(hidden), step.slots = slots;
  ProjectedGradient<T> project = {l.steps, l.D, true, {}, gradient, out<T>(dprojected), slots, {}};

  const bool one_chunk = slots == l.T;
  // In chunks the directions come to the rows of dx at different times, so both add.
  if (g.dx.defined() && l.D == 2 && !one_chunk) g.dx.zero_();
  int64_t begin[2] = {}, count = 0;
  for (int64_t s = 0; s < l.T; ++s) {
    const int64_t t[2] = {l.T - 1 - s, s};
    if (s % slots == 0) {
      count = std::min(slots, l.T - s);
      begin[0] = l.T - s - count, begin[1] = s;
    }
    step.first = project.first = s == 0;
    for (int d = 0; d < 2; ++d) {
      step.t[d] = project.t[d] = t[d];
      step.slot[d] = project.slot[d] = t[d] - begin[d];
    }
    if (l.projected) {
      check(launch_projection_step_bwd(project, stream));
      multiply(dhidden_all, dprojected_at.at(project.slot), w_hr);
    }
    check(launch_cell_step_bwd(step, stream));
    if (s + 1 < l.T || need_dh0) multiply(dh_all, dgates_at.at(step.slot), w_hh);
    if (s + 1 == l.T || (s + 1) % slots == 0) {
      const auto rows = [&](const at::Tensor& all, int d) {
        return all.defined() ? all.select(0, d).narrow(0, 0, count).flatten(0, 1) : at::Tensor();
      };
      for (int d = 0; d < l.D; ++d) {
        add_chunk<T>(l, multiply, given, g, d, begin[d], count, rows(dgates, d), rows(dprojected, d),
                     rows(hidden, d), l.D == 2 && (d == 1 || !one_chunk), stream);
      }
    }
  }
  if (need_dh0) {
    g.dh0 = at::empty({l.D, B, P}, l.options);
    check(launch_initial_state_bwd<T>({l.steps, l.D, gradient, out<T>(g.dh0)}, stream));
  }
  g.dc0 = dc;
}

// A gradient whose last stride is 1, as the kernels read it; undefined for none.
at::Tensor readable(const OptionalTensor& given, at::IntArrayRef shape, const Layer& l, const char* name) {
  if (!given || !given->defined()) return {};
  TORCH_CHECK(given->sizes() == shape && given->dtype() == l.options.dtype(), name, " must be ",
              l.options.dtype(), " ", shape, ", got ", given->dtype(), " ", given->sizes());
  return given->stride(-1) == 1 ? *given : given->contiguous();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& dcells, const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
    at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
    const at::Tensor& y, const at::Tensor& cells, const at::Tensor& reserve, const c10::List<bool>& needs) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const OnDeviceOf device(x);
  const Layer l(x, weights, lengths, reset_mask);
  const int64_t T = l.T, B = l.B, H = l.H, P = l.P;
  TORCH_CHECK(needs.size() == 3 + weights.size(), "needs must have ", 3 + weights.size(), " flags, got ",
              needs.size());
  TORCH_CHECK(reserve.sizes() == at::IntArrayRef({l.D, T, B, 4 * H}),
              "reserve must be [D, T, B, 4H] = ", at::IntArrayRef({l.D, T, B, 4 * H}), ", got ",
              reserve.sizes(), "; was forward told to keep it?");
  const Inputs given = {readable(dy, {T, B, l.D * P}, l, "dy"),
                        l.state(dh_n, P, "dh_n"),
                        l.state(dc_n, H, "dc_n"),
                        readable(dcells, {T, B, l.D * H}, l, "dcells"),
                        l.lengths.defined() && x.stride(2) != 1 ? x.contiguous() : x,
                        l.state(h0, P, "h0"),
                        l.state(c0, H, "c0"),
                        y.contiguous(),
                        cells.contiguous(),
                        reserve.contiguous()};

  const int64_t step_bytes = l.D * B * 4 * H * static_cast<int64_t>(x.element_size());
  const int64_t chunk = std::max(kChunkBytes, step_bytes * T / 4);
  const int64_t slots = std::clamp<int64_t>(chunk / std::max<int64_t>(step_bytes, 1), 1, T);
  Gradients g;
  if (needs[0]) g.dx = at::empty({T, B, l.I}, l.options);
  for (int d = 0; d < l.D; ++d) {
    const auto need = [&](int64_t k) { return needs[3 + d * l.per_direction + k]; };
    const bool several = slots < T;
    if (need(0)) g.ih[d] = Sum(l, {4 * H, l.I}, several);
    if (need(1)) g.hh[d] = Sum(l, {4 * H, P}, several || (given.h0.defined() && !l.ragged()));
    if (l.bias && (need(2) || need(3))) g.bias[d] = Sum(l, {4 * H}, true);
    if (l.projected && need(l.per_direction - 1)) g.hr[d] = Sum(l, {P, H}, several);
  }
  if (B > 0) {
    for_dtype(x.scalar_type(), [&](auto* type) {
      run<std::remove_pointer_t<decltype(type)>>(l, given, g, needs[1], slots, device.stream());
    });
  } else {
    g.dh0 = at::empty({l.D, B, P}, l.options), g.dc0 = at::empty({l.D, B, H}, l.options);
  }

  const at::Tensor none = at::empty({0}, l.options);
  std::vector<at::Tensor> dweights(weights.size(), none);
  for (int d = 0; d < l.D; ++d) {
    at::Tensor* const dw = &dweights[d * l.per_direction];
    const auto need = [&](int64_t k) { return needs[3 + d * l.per_direction + k]; };
    if (g.ih[d]) dw[0] = g.ih[d].result();
    if (g.hh[d]) dw[1] = g.hh[d].result();
    if (g.bias[d]) {
      const at::Tensor bias = g.bias[d].result();
      if (need(2)) dw[2] = bias;
      if (need(3))
        dw[3] = need(2) ? bias.clone() : bias;  // equal, but two parameters must not share a gradient
    }
    if (g.hr[d]) dw[l.per_direction - 1] = g.hr[d].result();
  }
  return {needs[0] ? g.dx : none, needs[1] ? g.dh0 : none, needs[2] ? g.dc0.to(l.options.dtype()) : none,
          dweights};
}

}  // namespace fastlstm::cuda
