// A single step in one direction, as LSTMCell takes it: the arithmetic of cpu/layer.h without the copies of
// states, the views and the buffers that a sequence needs.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "contract.h"

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
  // [5 * B * H]  for backward: the activated gates [B, 4H] as they are saved, and c again [B, H],
  // because torch.nn.LSTMCell lets its caller change the c it returns in place. Undefined unless asked for.
  at::Tensor reserve;
};
StepResults step_forward(const StepInputs& in, bool keep_reserve);

// In the order of StepInputs; undefined where not needed.
using StepGradients = std::array<at::Tensor, 7>;

// The gradients of a step from those of a layer of one step: backward(dh_n, dc_n, x, h0, c0, weights, needs)
// gives LayerGradients, its arguments as the contract has them.
template <class F>
StepGradients through_layer(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& in,
                            const std::array<bool, 7>& needs, F&& backward) {
  const auto as = [&](const at::Tensor& t, int64_t n) {
    return t.defined() ? OptionalTensor(t.reshape({1, in.B(), n})) : std::nullopt;
  };
  std::vector<at::Tensor> weights = {in.w_ih, in.w_hh};
  if (in.bias_ih.defined()) weights.insert(weights.end(), {in.bias_ih, in.bias_hh});
  c10::List<bool> flags;
  for (size_t k = 0; k < 3 + weights.size(); ++k) flags.push_back(needs[k]);
  auto [dx, dh0, dc0, dweights] = backward(as(dh, in.H()), as(dc, in.H()), *as(in.x, in.I()),
                                           as(in.h0, in.H()), as(in.c0, in.H()), weights, flags);
  dweights.resize(4);
  StepGradients out = {dx, dh0, dc0, dweights[0], dweights[1], dweights[2], dweights[3]};
  const std::array<const at::Tensor*, 3> like = {&in.x, &in.h0, &in.c0};
  for (size_t k = 0; k < 7; ++k) {
    if (!needs[k]) out[k] = at::Tensor();
    if (needs[k] && k < 3) out[k] = out[k].reshape(like[k]->sizes());
  }
  return out;
}

// dh, dc: gradients of h and c, either may be undefined.
StepGradients step_backward(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& in,
                            const at::Tensor& reserve, const std::array<bool, 7>& needs);

}  // namespace fastlstm
