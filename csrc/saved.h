// What an autograd node keeps of its forward's arguments and of y, as fastlstm/ops/saved.py does for nodes in
// Python. What backward does not read is not saved: it may change or be freed, as with nn.LSTM.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include "contract.h"

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

// The arguments, of `count`, that the backward op reads, where `needs` are wanted. Biases never; x and h0 for
// the gradients of the weights that they are multiplied by, and those weights the other way round. h_{t-1}'s
// gradient takes weight_hh in every step but the first. `steps`: there are others. zoneout_c: c before its
// zoneout is found again, from c0. With layer normalization (norm) all are read, by the formula of
// differentiable_backward at least.
inline Arguments read_by_backward(Arguments needs, size_t count, size_t per_direction, bool proj, bool steps,
                                  bool zoneout_c = false, bool norm = false) {
  if (norm) return ~Arguments{0};
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
  if (zoneout_c || (needs & ~(c0 | hr))) read |= c0;
  if (needs & x) read |= ih;
  if (steps || (needs & h0)) read |= hh;
  return read;
}

// A tensor of t's sizes, dtype and device without its values: one element in memory, all strides 0.
inline at::Tensor stand_in(const at::Tensor& t) {
  // Not by the dispatcher, where a mode may be at work.
  static const at::Tensor zero = [] {
    const at::Tensor made = at::detail::empty_cpu({1}, at::kDouble);
    *made.mutable_data_ptr<double>() = 0;
    return made;
  }();
  // CUDA kernels want an address on their device.
  const at::Tensor element = t.is_cpu() ? at::Tensor() : at::empty({1}, t.options());
  c10::Storage storage = t.is_cpu() ? zero.storage() : element.storage();
  auto impl = c10::make_intrusive<at::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(t.options().computeDispatchKey()), t.dtype());
  impl->set_sizes_and_strides(t.sizes(), c10::SmallVector<int64_t, 5>(t.dim(), 0));
  return at::Tensor(std::move(impl));
}

// In forward: takes the arguments that backward does not read out of `inputs`, so that save_for_backward
// neither checks their versions nor keeps them alive, as nn.LSTM's nodes do not. Their sizes stay, in a
// stand-in. The formula of differentiable_backward does not need their values either: it is given the gates.
// Weights that are leaves with a gradient stay themselves: their gradient accumulator, which the graph holds,
// keeps them alive anyway, and kernels would copy a stand-in to make it contiguous. So do subclasses.
// ctx->saved_data has each under a key of one letter, since compiled autograd sees no tensor in a list.
inline void set_unread_aside(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list& inputs,
                             Arguments read) {
  auto& aside = ctx->saved_data;
  aside.reserve(8);
  for (size_t k = 0; k < inputs.size(); ++k) {
    if (!inputs[k].defined() || (read & bit(k))) continue;
    const at::Tensor& t = inputs[k];
    const bool itself = (k >= 3 && t.requires_grad() && t.is_leaf()) || !t.has_storage() ||
                        t.key_set().has(c10::DispatchKey::Python);
    aside.emplace(std::string(1, static_cast<char>('a' + k)), itself ? t : stand_in(t));
    inputs[k] = at::Tensor();
  }
}

// In backward: puts a tensor of the right sizes in the place of each of them. Returns which they are.
inline Arguments restore_unread(torch::autograd::AutogradContext* ctx,
                                torch::autograd::variable_list& inputs) {
  Arguments unread = 0;
  for (const auto& [key, value] : ctx->saved_data)
    if (key.size() == 1) inputs[key[0] - 'a'] = value.toTensor(), unread |= bit(key[0] - 'a');
  return unread;
}

// For the formula: replaces `unread` of the n arguments by zeros with the edge that the argument had in
// forward, so that a gradient of the gradient finds it.
inline void connect_unread(torch::autograd::variable_list& inputs, size_t n, Arguments unread) {
  const auto node = torch::autograd::get_current_node();
  size_t edge = 0;  // which exist for the tensors that were given only
  for (size_t k = 0; k < n; ++k) {
    if (!inputs[k].defined()) continue;
    if (unread & bit(k)) {
      inputs[k] = at::zeros({1}, inputs[k].options()).expand(inputs[k].sizes());
      const torch::autograd::Edge to = node ? node->next_edge(edge) : torch::autograd::Edge();
      if (to.is_valid()) torch::autograd::impl::set_gradient_edge(inputs[k] = inputs[k].variable_data(), to);
    }
    ++edge;
  }
}

// The gates for the formula; by an op, which a trace can record.
inline at::Tensor saved_gates(const at::Tensor& reserve, const at::Tensor& x, at::TensorList weights,
                              const OptionalTensor& lengths) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::native_gates", "").typed<SavedGates>();
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(reserve, x, weights, lengths);
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
