// What an autograd node keeps of its forward's arguments and of y, as fastlstm/ops/saved.py does for nodes in
// Python. In-place changes are an error only in what backward reads.
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/custom_function.h>

namespace fastlstm {

// Sets of the differentiable arguments of a layer or a cell, as bits in the order of `needs`: x, h0, c0,
// *weights.
using Arguments = uint64_t;

inline Arguments bit(size_t k) { return Arguments{1} << k; }

// Those of `inputs`, in that order, that require a gradient.
inline Arguments requiring_grad(const torch::autograd::variable_list& inputs) {
  Arguments needs = 0;
  for (size_t k = 0; k < inputs.size(); ++k)
    if (inputs[k].defined() && inputs[k].requires_grad()) needs |= bit(k);
  return needs;
}

// Which of `count` arguments the backward op reads, where `needs` are wanted. Biases never; x and h0 for the
// gradients of the weights that they are multiplied by, and those weights the other way round. h_{t-1}'s
// gradient takes weight_hh in every step but the first. `steps`: there are others.
inline Arguments read_by_backward(Arguments needs, size_t count, size_t per_direction, bool proj,
                                  bool steps) {
  Arguments ih = 0, hh = 0, biases = 0, hr = 0;
  for (size_t k = 3; k < count; k += per_direction) {
    ih |= bit(k), hh |= bit(k + 1);
    if (per_direction > 3) biases |= bit(k + 2) | bit(k + 3);
    if (proj) hr |= bit(k + per_direction - 1);
  }
  const Arguments x = bit(0), h0 = bit(1), c0 = bit(2);
  Arguments read = hr;
  if (needs & ih) read |= x;
  if (needs & hh) read |= h0;
  if (needs & ~(c0 | hr)) read |= c0;
  if (needs & x) read |= ih;
  if (steps || (needs & h0)) read |= hh;
  return read;
}

inline int64_t version_of(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }

// In forward: takes the arguments that backward does not read out of `inputs`, which is what
// save_for_backward checks the versions of. The formula of differentiable_backward reads them all.
// ctx->saved_data has each under a key of one letter, since compiled autograd sees no tensor in a list.
inline void hold_unread(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list& inputs,
                        Arguments read) {
  auto& held = ctx->saved_data;
  int64_t versions = 0;  // which only rise: the sum is as it was where each one is
  held.reserve(8);
  for (size_t k = 0; k < inputs.size(); ++k) {
    if (!inputs[k].defined() || (read & bit(k))) continue;
    versions += version_of(inputs[k]);
    held.emplace(std::string(1, static_cast<char>('a' + k)), std::move(inputs[k]));
    inputs[k] = at::Tensor();
  }
  held.emplace("versions", versions);
}

// In backward: puts them back into `inputs`. Returns true if one of them has been changed since forward.
inline bool restore_unread(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list& inputs) {
  int64_t versions = 0;
  for (const auto& [key, value] : ctx->saved_data)
    if (key.size() == 1) versions += version_of(inputs[key[0] - 'a'] = value.toTensor());
  const auto before = ctx->saved_data.find("versions");
  const bool changed = before != ctx->saved_data.end() && before->second.toInt() != versions;
  // One that was changed may lead back to this node, which would then never be freed.
  for (auto& [key, value] : ctx->saved_data)
    if (changed && key.size() == 1) value = value.toTensor().detach();
  return changed;
}

inline void check_unchanged(bool changed) {
  TORCH_CHECK(
      !changed,
      "one of the variables needed for gradient computation has been modified by an inplace operation: an "
      "argument of an LSTM layer, which the gradient of its gradient reads");
}

// What save_for_backward is given of y, an output: an alias, so that changing y in place is no error. A
// kernel's results have version 0; where y has another one in backward, what the alias holds is not y.
inline at::Tensor save_output(torch::autograd::AutogradContext* ctx, const at::Tensor& y) {
  // Not by the dispatcher, where a mode may be at work.
  static const at::Tensor none = at::detail::empty_cpu({0}, at::kFloat);
  // It shares y's version counter and nothing else, so that a saved-tensor hook may free y.
  const at::Tensor counter(none.unsafeGetTensorImpl()->shallow_copy_and_detach(
      y.unsafeGetTensorImpl()->version_counter(), /*allow_tensor_metadata_change=*/false));
  ctx->saved_data.emplace("output", counter);
  return y.variable_data();
}

inline bool output_changed(torch::autograd::AutogradContext* ctx) {
  const auto held = ctx->saved_data.find("output");
  return held == ctx->saved_data.end() || held->second.toTensor()._version() != 0;
}

}  // namespace fastlstm
