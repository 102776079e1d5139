// What an autograd node keeps of its forward's arguments and of y, as fastlstm/ops/saved.py does for nodes in
// Python. In-place changes are an error only in what backward reads.
#pragma once

#include <ATen/EmptyTensor.h>
#include <torch/csrc/autograd/custom_function.h>

namespace fastlstm {

// The differentiable arguments of a layer or a cell in the order of `needs`: x, h0, c0, *weights.
// Which of them the backward op reads, where `needs` are wanted, as bits of that order. `steps`: more than
// one.
inline uint64_t read_by_backward(const std::vector<bool>& needs, size_t per_direction, bool bias, bool proj,
                                 bool steps) {
  bool ih = false, hh = false, others = needs[0] || needs[1];
  for (size_t k = 3; k < needs.size(); ++k) {
    const size_t role = (k - 3) % per_direction;
    ih |= role == 0 && needs[k];
    hh |= role == 1 && needs[k];
    others |= !(proj && role == per_direction - 1) && needs[k];
  }
  uint64_t read = 0;
  const auto mark = [&](size_t k, bool is_read) { read |= uint64_t{is_read} << k; };
  mark(0, ih), mark(1, hh), mark(2, others);
  for (size_t k = 3; k < needs.size(); ++k) {
    const size_t role = (k - 3) % per_direction;
    const bool is_bias = bias && (role == 2 || role == 3);
    mark(k, role == 0 ? needs[0] : role == 1 ? steps || needs[1] : !is_bias);
  }
  return read;
}

inline int64_t version_of(const at::Tensor& t) { return t.is_inference() ? 0 : t._version(); }

// In forward: takes the arguments that backward does not read out of `inputs`, which is what
// save_for_backward checks the versions of. The formula of differentiable_backward reads them all.
// ctx->saved_data has each under a key of one letter, since compiled autograd sees no tensor in a list.
inline void hold_unread(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list& inputs,
                        uint64_t read) {
  auto& held = ctx->saved_data;
  int64_t versions = 0;  // which only rise: the sum is as it was where each one is
  held.reserve(8);
  for (size_t k = 0; k < inputs.size(); ++k) {
    if (!inputs[k].defined() || (read >> k & 1)) continue;
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

// Notes the version of y, an output, which save_for_backward is given an alias of: changing y in place is no
// error, but what the alias holds is then not y.
inline at::Tensor save_output(torch::autograd::AutogradContext* ctx, const at::Tensor& y) {
  // Not by the dispatcher, where a mode may be at work.
  static const at::Tensor none = at::detail::empty_cpu({0}, at::kFloat);
  // It shares y's version counter and nothing else, so that a saved-tensor hook may free y.
  const at::Tensor counter(none.unsafeGetTensorImpl()->shallow_copy_and_detach(
      y.unsafeGetTensorImpl()->version_counter(), /*allow_tensor_metadata_change=*/false));
  ctx->saved_data.emplace("output", counter);
  ctx->saved_data.emplace("output_version", static_cast<int64_t>(y._version()));
  return y.variable_data();
}

inline bool output_changed(torch::autograd::AutogradContext* ctx) {
  const auto held = ctx->saved_data.find("output");
  return held != ctx->saved_data.end() && static_cast<int64_t>(held->second.toTensor()._version()) !=
                                              ctx->saved_data["output_version"].toInt();
}

}  // namespace fastlstm
