// A single step in one direction, as LSTMCell takes it: the arithmetic of cpu/layer.h without the copies of
// states, the views and the buffers that a sequence needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

namespace fastlstm {

// What a step reads; x [B, I], h0 and c0 [B, H], or [I] and [H] without a batch. Weights as torch.nn.LSTMCell
// has them. h0 with c0, and bias_ih with bias_hh, may be undefined.
struct StepInputs {
  at::Tensor x, h0, c0, w_ih, w_hh, bias_ih, bias_hh;

  int64_t B() const { return x.dim() == 2 ? x.size(0) : 1; }
  int64_t I() const { return w_ih.size(1); }
  int64_t H() const { return w_hh.size(1); }
};

struct StepResults {
  at::Tensor h, c;  // [B, H] or [H]
  // [5 * B * H]  for backward: the activated gates [B, 4H] in the layout of gate_at, and c again [B, H],
  // because torch.nn.LSTMCell lets its caller change the c it returns in place. Undefined unless asked for.
  at::Tensor reserve;
};
StepResults step_forward(const StepInputs& in, bool keep_reserve);

// In the order of StepInputs; undefined where not needed.
using StepGradients = std::array<at::Tensor, 7>;
// dh, dc: gradients of h and c, either may be undefined.
StepGradients step_backward(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& in,
                            const at::Tensor& reserve, const std::array<bool, 7>& needs);

}  // namespace fastlstm
