// Forward: x W_ih^T for a chunk of steps, then per step one GEMM with W_hh and one cell kernel, each for both
// directions, or one persistent kernel for the whole chunk. No host synchronization; everything runs on the
// current stream.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "cuda/device.h"
#include "cuda/layer_persistent.h"
#include "cuda/products.h"

namespace fastlstm::cuda {
namespace {

// [D, B, P]: h0, as the GEMM with W_hh reads it in the first step: zero in rows that are reset there, then
// masked. In reverse no sequence starts at step T - 1.
at::Tensor first_h_prev(const Layer& l) {
  if (!l.reset_mask.defined() && !l.recurrent_mask.defined()) return l.h0;
  std::vector<at::Tensor> directions;
  for (int64_t d = 0; d < l.D; ++d) {
    at::Tensor& h = directions.emplace_back(l.h0.select(0, d));
    if (d == 0 && l.reset_mask.defined()) h = h.masked_fill(l.reset_mask.select(0, 0).unsqueeze(1), 0);
    if (l.recurrent_mask.defined()) h = h.mul(l.recurrent_mask.select(0, d).select(0, d == 0 ? 0 : l.T - 1));
  }
  return at::stack(directions);
}

// gates_x [D, slots, B, 4H] = x W_ih^T for `count` steps of each direction d, from step begin[d] on.
void input_gates(const Layer& l, const Gemm& gemm, const at::Tensor& x, const int64_t (&begin)[2],
                 int64_t count, const at::Tensor& gates_x) {
  at::Tensor rows;  // [count * B, I]
  for (int64_t d = 0; d < l.D; ++d) {
    if (d == 0 || begin[1] != begin[0]) rows = x.narrow(0, begin[d], count).reshape({count * l.B, l.I});
    at::Tensor gates = gates_x.select(0, d).narrow(0, 0, count).view({count * l.B, 4 * l.H});
    gemm(gates, rows, l.weights[d].ih.t());
  }
}

// cells, reserve: undefined if not needed.
template <class T>
void run(const Layer& l, const at::Tensor& x, const at::Tensor& y, const at::Tensor& h_n,
         const at::Tensor& c_n, const at::Tensor& cells, const at::Tensor& reserve, cudaStream_t stream) {
  const Gemm gemm(l.dtype);
  const int D = static_cast<int>(l.D);
  // x W_ih^T is stored in the accumulation dtype, for a chunk of steps: inference has no buffer of T steps.
  const int64_t step_bytes = std::max<int64_t>(1, D * l.B * 4 * l.H * static_cast<int64_t>(sizeof(Acc<T>)));
  PersistentPass<T> persistent(l, Phase::forward, gemm.tf32(), stream);
  const int64_t chunk_bytes = persistent ? kPersistentStepChunkBytes : kStepChunkBytes;
  const int64_t slots = std::clamp<int64_t>(chunk_bytes / step_bytes, 1, l.T);
  const at::Tensor gates_x = at::empty({D, slots, l.B, 4 * l.H}, l.sum_options);
  at::Tensor gates_h, h, unmasked_h, c, hidden, projected, w_hh_t, w_hr_t;
  // The same buffers as operands of the steps' GEMMs.
  at::Tensor gates_h_all, h_all, hidden_all, projected_all;
  if (l.T > 1) {
    h = at::empty({D, l.B, l.P}, l.options);
    if (l.recurrent_mask.defined() || l.zoneout_h.defined())
      unmasked_h = at::empty({D, l.B, l.P}, l.sum_options);
    c = at::empty({D, l.B, l.H}, l.sum_options);
  }
  if (l.proj()) {
    hidden = at::empty({D, l.B, l.H}, l.options), hidden_all = l.batched_operand(hidden);
    projected = at::empty({D, l.B, l.P}, l.sum_options), projected_all = l.batched_operand(projected);
    w_hr_t = l.stacked(&DirectionWeights::hr).transpose(-2, -1);
  }

  const HiddenState<T> state = {l.P,
                                in<T>(l.h0),
                                out<T>(h),
                                out<T>(y),
                                nullptr,
                                out<Acc<T>>(unmasked_h),
                                mask_view(l.recurrent_mask),
                                mask_view(l.zoneout_h)};
  ForwardStep<T> step = {};
  step.steps = l.steps, step.H = l.H, step.D = D;
  step.gates_x = in<Acc<T>>(gates_x), step.slots = slots;
  for (int d = 0; d < D; ++d) {
    step.bias_ih[d] = in<T>(l.weights[d].bias_ih), step.bias_hh[d] = in<T>(l.weights[d].bias_hh);
    step.norm[d] = norm_weights<T>(l.weights[d]);
  }
  step.c0 = in<T>(l.c0), step.c = out<Acc<T>>(c);
  step.cells = out<T>(cells), step.gates = out<T>(reserve), step.hidden = out<T>(hidden);
  step.state = state, step.zoneout = mask_view(l.zoneout_c);
  ProjectedStep<T> project = {l.steps, D, true, {}, in<Acc<T>>(projected), state};

  // Prepares what only the step-wise kernels need, before step s.
  const auto begin_steps = [&](int64_t s) {
    if (l.norm) {  // normalizes a W_hh h of zeros, too
      gates_h = at::zeros({D, l.B, 4 * l.H}, l.sum_options), gates_h_all = l.batched_operand(gates_h);
      step.gates_h = out<Acc<T>>(gates_h);
    } else if (l.T > 1 || l.h0.defined()) {
      gates_h = at::empty({D, l.B, 4 * l.H}, l.sum_options), gates_h_all = l.batched_operand(gates_h);
    }
    if (gates_h.defined()) {
      w_hh_t = l.stacked(&DirectionWeights::hh).transpose(-2, -1);
    }
    if (s == 0 && l.h0.defined()) h_all = l.batched_operand(first_h_prev(l));
    if (s > 0) h_all = l.batched_operand(h);
  };
  if (!persistent) begin_steps(0);
  int64_t begin[2] = {};
  for (int64_t s = 0; s < l.T; ++s) {
    if (s % slots == 0) {
      const int64_t count = std::min(slots, l.T - s);
      begin[0] = s, begin[1] = l.T - s - count;
      input_gates(l, gemm, x, begin, count, gates_x);
      if (persistent) {
        ForwardStep<T> steps = step;
        steps.c_n = out<T>(c_n), steps.state.h_n = out<T>(h_n);
        if (persistent.forward(steps, s, count, begin)) {
          s += count - 1;
          continue;
        }
        begin_steps(s);
      }
    }
    if (s == 1) h_all = l.batched_operand(h);
    if (h_all.defined()) {
      gemm(gates_h_all, h_all, w_hh_t);
      step.gates_h = out<Acc<T>>(gates_h);
    }
    step.first = project.first = s == 0;
    for (int d = 0; d < 2; ++d) {
      step.t[d] = project.t[d] = d == 0 ? s : l.T - 1 - s;
      step.slot[d] = step.t[d] - begin[d];
    }
    if (s == l.T - 1) {
      step.c_n = out<T>(c_n);
      step.state.h_n = project.state.h_n = out<T>(h_n);
    }
    check(launch_cell_step_fwd(step, stream));
    if (l.proj()) {
      gemm(projected_all, hidden_all, w_hr_t);
      check(launch_projection_step_fwd(project, stream));
    }
  }
}

}  // namespace

LayerResults layer_forward(const LayerInputs& in, bool keep_cells, bool keep_reserve) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const DeviceGuard device(in.x);
  const Layer l(in);
  const at::Tensor y = at::empty({l.T, l.B, l.D * l.P}, l.options);
  const at::Tensor h_n = at::empty({l.D, l.B, l.P}, l.options), c_n = at::empty({l.D, l.B, l.H}, l.options);
  at::Tensor cells, reserve;
  if (keep_cells || keep_reserve) cells = at::empty({l.T, l.B, l.D * l.H}, l.options);
  if (keep_reserve) reserve = at::empty(l.reserve(), l.options);
  if (l.B > 0) {
    for_dtype(l.dtype, [&](auto* type) {
      run<std::remove_pointer_t<decltype(type)>>(l, in.x, y, h_n, c_n, cells, reserve, device.stream());
    });
  }
  const auto or_none = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, l.options); };
  return {y, h_n, c_n, or_none(cells), or_none(reserve)};
}

}  // namespace fastlstm::cuda
