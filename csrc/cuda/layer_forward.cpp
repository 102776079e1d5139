// Forward: the input products of many steps at once, then for every step one product with W_hh and one cell
// kernel, each for both directions. No host synchronisation; everything on the current stream.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include "cuda/device.h"
#include "cuda/layer.h"
#include "cuda/products.h"

namespace fastlstm::cuda {
namespace {

// x W_ih^T is kept in the accumulation type, and only for as many steps as fit here: enough for two waves of
// tiles on the largest GPUs, little enough to stay in L2 until the cell kernel reads it, and no buffer of T
// steps in inference.
constexpr int64_t kInputGateBytes = 32 << 20;

// The h that enters the first step, for the product with W_hh: zero in rows that begin a sequence there. The
// reverse direction begins none at step T - 1.
at::Tensor entering_first(const Layer& l, const at::Tensor& h0) {
  if (!h0.defined() || !l.reset_mask.defined()) return h0;
  const at::Tensor forward = h0.select(0, 0).masked_fill(l.reset_mask.select(0, 0).unsqueeze(1), 0);
  return l.D == 1 ? forward.unsqueeze(0) : at::stack({forward, h0.select(0, 1)});
}

// x W_ih^T for `count` steps of each direction, those of direction d from begin[d] on.
void input_gates(const Layer& l, const Products& multiply, const at::Tensor& x, const int64_t (&begin)[2],
                 int64_t count, const at::Tensor& gates_x) {
  at::Tensor rows;  // [count * B, I]
  for (int d = 0; d < l.D; ++d) {
    if (d == 0 || begin[1] != begin[0]) rows = x.narrow(0, begin[d], count).reshape({count * l.B, l.I});
    at::Tensor gates = gates_x.select(0, d).narrow(0, 0, count).view({count * l.B, 4 * l.H});
    multiply(gates, rows, l.weights[d].ih.t());
  }
}

struct Results {
  at::Tensor y, h_n, c_n, cells, reserve;
};

template <class T>
void run(const Layer& l, const at::Tensor& x, const at::Tensor& h0, const at::Tensor& c0,
         const Results& results, bool keep_cells, bool keep_gates, cudaStream_t stream) {
  const Products multiply(l.options.dtype().toScalarType());
  const int64_t step_bytes = l.D * l.B * 4 * l.H * static_cast<int64_t>(sizeof(Acc<T>));
  const int64_t slots = std::clamp<int64_t>(kInputGateBytes / step_bytes, 1, l.T);
  const bool recurrent = l.T > 1 || h0.defined();

  const at::Tensor gates_x = at::empty({l.D, slots, l.B, 4 * l.H}, l.accumulated);
  at::Tensor gates_h, h, c, hidden, projected, w_hh_t, w_hr_t;
  if (recurrent) {
    gates_h = at::empty({l.D, l.B, 4 * l.H}, l.accumulated);
    w_hh_t = l.stacked(&DirectionWeights::hh).transpose(-2, -1);
  }
  if (l.T > 1) {
    h = at::empty({l.D, l.B, l.P}, l.options);
    c = at::empty({l.D, l.B, l.H}, l.accumulated);
  }
  if (l.projected) {
    hidden = at::empty({l.D, l.B, l.H}, l.options);
    projected = at::empty({l.D, l.B, l.P}, l.accumulated);
    w_hr_t = l.stacked(&DirectionWeights::hr).transpose(-2, -1);
  }
  const HiddenState<T> state = {l.P, in<T>(h0), out<T>(h), out<T>(results.y), nullptr};
  ForwardStep<T> step = {};
  step.steps = l.steps, step.H = l.H, step.D = l.D;
  step.gates_x = in<Acc<T>>(gates_x), step.slots = slots;
  for (int d = 0; d < l.D; ++d) {
    step.bias_ih[d] = in<T>(l.weights[d].bias_ih), step.bias_hh[d] = in<T>(l.weights[d].bias_hh);
  }
  step.c0 = in<T>(c0), step.c = out<Acc<T>>(c);
  step.cells = keep_cells ? out<T>(results.cells) : nullptr;
  step.gates = keep_gates ? out<T>(results.reserve) : nullptr;
  step.hidden = out<T>(hidden), step.state = state;
  ProjectedStep<T> project = {l.steps, l.D, true, {}, in<Acc<T>>(projected), state};

  at::Tensor gates_h_all, h_all, hidden_all, projected_all;
  if (recurrent) gates_h_all = l.per_product(gates_h);
  if (h0.defined()) h_all = l.per_product(entering_first(l, h0));
  if (l.projected) hidden_all = l.per_product(hidden), projected_all = l.per_product(projected);

  int64_t begin[2] = {};
  for (int64_t s = 0; s < l.T; ++s) {
    const int64_t t[2] = {s, l.T - 1 - s};
    if (s % slots == 0) {
      const int64_t count = std::min(slots, l.T - s);
      begin[0] = s, begin[1] = l.T - s - count;
      input_gates(l, multiply, x, begin, count, gates_x);
    }
    if (h_all.defined()) {
      multiply(gates_h_all, h_all, w_hh_t);
      step.gates_h = in<Acc<T>>(gates_h);
    }
    step.first = project.first = s == 0;
    for (int d = 0; d < 2; ++d) step.t[d] = project.t[d] = t[d], step.slot[d] = t[d] - begin[d];
    if (s == l.T - 1) {
      step.c_n = out<T>(results.c_n);
      step.state.h_n = project.state.h_n = out<T>(results.h_n);
    } else if (s == 0) {
      h_all = l.per_product(h);
    }
    check(launch_cell_step_fwd(step, stream));
    if (l.projected) {
      multiply(projected_all, hidden_all, w_hr_t);
      check(launch_projection_step_fwd(project, stream));
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_forward(
    const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& lengths, const OptionalTensor& reset_mask, bool keep_cells, bool keep_reserve) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const OnDeviceOf device(x);
  const Layer l(x, weights, lengths, reset_mask);
  const at::Tensor h = l.state(h0, l.P, "h0"), c = l.state(c0, l.H, "c0");
  const bool cells = keep_cells || keep_reserve;
  const Results results = {
      at::empty({l.T, l.B, l.D * l.P}, l.options),
      at::empty({l.D, l.B, l.P}, l.options),
      at::empty({l.D, l.B, l.H}, l.options),
      cells ? at::empty({l.T, l.B, l.D * l.H}, l.options) : at::empty({0}, l.options),
      keep_reserve ? at::empty({l.D, l.T, l.B, 4 * l.H}, l.options) : at::empty({0}, l.options),
  };
  if (l.B > 0) {
    for_dtype(x.scalar_type(), [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      run<T>(l, x, h, c, results, cells, keep_reserve, device.stream());
    });
  }
  return {results.y, results.h_n, results.c_n, results.cells, results.reserve};
}

}  // namespace fastlstm::cuda
