// The autograd node of fastlstm::native_layer, for every device. The same formula as fastlstm/ops/register.py
// gives the backends written in Python; in C++ it costs a third, and call overhead decides tiny sequences.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "contract.h"
#include "saved.h"

namespace fastlstm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class F>
const c10::TypedOperatorHandle<F> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

LayerResults below_autograd(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                            at::TensorList weights, const OptionalTensor& lengths,
                            const OptionalTensor& reset_mask, bool keep_cells, bool keep_reserve) {
  static const auto op = find<LayerForward>("fastlstm::native_layer");
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
}

OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// Returns true if the formula of plain ops must take these gradients, not the op: with create_graph=True,
// where many arrive as one (is_grads_batched=True), and where one has a tangent of forward-mode AD.
bool needs_differentiable_backward(const variable_list& grads) {
  constexpr c10::DispatchKeySet batched({c10::DispatchKey::Batched, c10::DispatchKey::FuncTorchBatched});
  return at::GradMode::is_enabled() || std::any_of(grads.begin(), grads.end(), [&](const at::Tensor& t) {
           return t.defined() && (t.key_set().has_any(batched) || t._fw_grad(/*level=*/0).defined());
         });
}

class LayerFunction : public torch::autograd::Function<LayerFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList weights,
                               const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                               bool keep_cells, LayerResults* results) {
    *results = below_autograd(x, h0, c0, weights, lengths, reset_mask, keep_cells, /*keep_reserve=*/true);
    const auto& [y, h_n, c_n, cells, reserve] = *results;
    variable_list saved = {x, h0.value_or(at::Tensor()), c0.value_or(at::Tensor())};
    saved.reserve(8 + weights.size());
    saved.insert(saved.end(), weights.begin(), weights.end());
    // A graph that holds this node's ops cannot ask for versions when it runs: its backward finds h again.
    const bool traced = x.key_set().has(c10::DispatchKey::Python);
    if (!traced) set_unread_aside(ctx, saved, read(saved));
    saved.push_back(lengths.value_or(at::Tensor()));
    saved.push_back(reset_mask.value_or(at::Tensor()));
    saved.push_back(traced ? at::Tensor() : save_output(ctx, y));
    saved.push_back(cells);
    saved.push_back(reserve);
    ctx->save_for_backward(std::move(saved));
    // Else an unused result would arrive in backward as a buffer of zeros.
    ctx->set_materialize_grads(false);
    // The constant results are no outputs of the node: compiled autograd refuses mark_non_differentiable.
    variable_list differentiable = {y, h_n, c_n};
    if (keep_cells) differentiable.push_back(cells);
    return differentiable;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    const OptionalTensor dy = optional(grads[0]), dh_n = optional(grads[1]), dc_n = optional(grads[2]),
                         dcells = grads.size() > 3 ? optional(grads[3]) : std::nullopt;
    const Arguments unread = restore_unread(ctx, saved);
    const size_t n = saved.size() - 5;
    const bool by_formula = needs_differentiable_backward(grads);
    if (by_formula) connect_unread(saved, n, unread);
    const at::Tensor x = saved[0];
    const OptionalTensor h0 = optional(saved[1]), c0 = optional(saved[2]);
    const at::TensorList weights = at::TensorList(saved).slice(3, n - 3);
    const OptionalTensor lengths = optional(saved[n]), reset_mask = optional(saved[n + 1]);
    // Edges exist for the tensors that were given only.
    size_t edge = 0;
    c10::List<bool> needs;
    needs.reserve(3 + weights.size());
    needs.push_back(ctx->needs_input_grad(edge++));
    needs.push_back(h0 && ctx->needs_input_grad(edge));
    edge += h0.has_value();
    needs.push_back(c0 && ctx->needs_input_grad(edge));
    edge += c0.has_value();
    for (size_t k = 0; k < weights.size(); ++k) needs.push_back(ctx->needs_input_grad(edge++));

    LayerGradients found;
    if (by_formula) {
      static const auto op = find<DifferentiableBackward>("fastlstm::differentiable_backward");
      const at::Tensor gates = saved_gates(saved[n + 4], x, weights, lengths);
      found = op.call(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, gates, saved[n + 3],
                      needs);
    } else {
      static const auto op = find<LayerBackward>("fastlstm::native_layer_backward");
      at::AutoDispatchBelowADInplaceOrView guard;
      const bool lacks_y = !saved[n + 2].defined() || output_changed(ctx);
      const at::Tensor y = lacks_y ? at::empty({0}, x.options()) : saved[n + 2];
      found = op.call(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, y, saved[n + 3],
                      saved[n + 4], needs);
    }
    auto& [dx, dh0, dc0, dweights] = found;
    // One gradient for each tensor of forward's arguments, an absent optional included, and each other
    // argument.
    variable_list out = {needs[0] ? dx : at::Tensor(), needs[1] ? dh0 : at::Tensor(),
                         needs[2] ? dc0 : at::Tensor()};
    for (size_t k = 0; k < weights.size(); ++k) out.push_back(needs[3 + k] ? dweights[k] : at::Tensor());
    out.resize(out.size() + 4);  // lengths, reset_mask, keep_cells, results
    return out;
  }

 private:
  // read_by_backward of a layer's arguments, of which those that require a gradient may be asked for one.
  static Arguments read(const variable_list& inputs) {
    const at::TensorList weights = at::TensorList(inputs).slice(3);
    const bool proj = weights[1].size(1) * 4 != weights[1].size(0);
    const int64_t per_direction = LayerSizes::weights_per_direction(weights, proj);
    return read_by_backward(requiring_grad(inputs), inputs.size(), per_direction, proj,
                            inputs[0].dim() == 2 || inputs[0].size(0) > 1);
  }
};

LayerResults layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                   at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                   bool keep_cells, bool keep_reserve) {
  // What is recorded of a call must not depend on the grad mode of the moment: keep_reserve is the caller's
  // own wish, and a call that is differentiated keeps one whatever it says.
  const auto requires_grad = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  bool differentiable = x.requires_grad() || requires_grad(h0) || requires_grad(c0);
  for (const at::Tensor& w : weights) differentiable |= w.requires_grad();
  if (!differentiable || !at::GradMode::is_enabled())
    return below_autograd(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
  LayerResults results;
  variable_list out = LayerFunction::apply(x, h0, c0, weights, lengths, reset_mask, keep_cells, &results);
  auto& [y, h_n, c_n, cells, reserve] = results;
  return {out[0], out[1], out[2], keep_cells ? out[3] : cells, reserve};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, Autograd, m) { m.impl("native_layer", layer); }

}  // namespace fastlstm
