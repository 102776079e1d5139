// The autograd nodes: of fastlstm::native_layer, for every device, and of LSTMCell's call, for plain CPU
// tensors. The layer's formula is that of fastlstm/ops/register.py, for the backends written in Python;
// in C++ it costs a third, and call overhead decides tiny sequences. In one file, because torch's headers are
// most of what is compiled.
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "cell_step.h"
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

LayerResults below_autograd(const LayerInputs& in, bool keep_cells, bool keep_reserve) {
  static const auto op = find<LayerForward>("fastlstm::native_layer");
  at::AutoDispatchBelowADInplaceOrView guard;
  return call(op, in, keep_cells, keep_reserve);
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
  // The differentiable arguments that `in` holds, which the base class looks for.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const OptionalTensor& h0,
                               const OptionalTensor& c0, at::TensorList weights, const LayerInputs* in,
                               bool keep_cells, LayerResults* results) {
    *results = below_autograd(*in, keep_cells, /*keep_reserve=*/true);
    const auto& [y, h_n, c_n, cells, reserve] = *results;
    variable_list saved = {x, h0.value_or(at::Tensor()), c0.value_or(at::Tensor())};
    saved.reserve(3 + weights.size() + LayerInputs::kOptions + 3);
    saved.insert(saved.end(), weights.begin(), weights.end());
    // A graph that holds this node's ops cannot ask for versions when it runs: its backward finds h again.
    const bool traced = x.key_set().has(c10::DispatchKey::Python);
    if (!traced) set_unread_aside(ctx, saved, read(saved, in->zoneout_c.has_value()));
    for (const OptionalTensor* option : in->options()) saved.push_back(option->value_or(at::Tensor()));
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
    const size_t n = saved.size() - LayerInputs::kOptions - 3;
    const bool by_formula = needs_differentiable_backward(grads);
    if (by_formula) connect_unread(saved, n, unread);
    const at::Tensor x = saved[0];
    const OptionalTensor h0 = optional(saved[1]), c0 = optional(saved[2]);
    const at::TensorList weights = at::TensorList(saved).slice(3, n - 3);
    LayerInputs::Options options;
    for (size_t k = 0; k < options.size(); ++k) options[k] = optional(saved[n + k]);
    const LayerInputs in = LayerInputs::with_options(x, h0, c0, weights, options);
    const at::Tensor *const results = &saved[n + options.size()], &y_kept = results[0], &cells = results[1],
                            &reserve = results[2];
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
      // With layer normalization it computes all again, from the inputs alone.
      const OptionalTensor gates =
          LayerSizes::has_norm(weights) ? OptionalTensor() : saved_gates(reserve, x, weights, in.lengths);
      found = call(op, {dy, dh_n, dc_n, dcells}, in, gates, cells, needs);
    } else {
      static const auto op = find<LayerBackward>("fastlstm::native_layer_backward");
      at::AutoDispatchBelowADInplaceOrView guard;
      const bool lacks_y = !y_kept.defined() || output_changed(ctx);
      const at::Tensor y = lacks_y ? at::empty({0}, x.options()) : y_kept;
      found = call(op, {dy, dh_n, dc_n, dcells}, in, y, cells, reserve, needs);
    }
    auto& [dx, dh0, dc0, dweights] = found;
    // One gradient for each tensor of forward's arguments, an absent optional included, and each other
    // argument.
    variable_list out = {needs[0] ? dx : at::Tensor(), needs[1] ? dh0 : at::Tensor(),
                         needs[2] ? dc0 : at::Tensor()};
    for (size_t k = 0; k < weights.size(); ++k) out.push_back(needs[3 + k] ? dweights[k] : at::Tensor());
    out.resize(out.size() + 3);  // in, keep_cells, results
    return out;
  }

 private:
  // read_by_backward of a layer's arguments, of which those that require a gradient may be asked for one.
  static Arguments read(const variable_list& inputs, bool zoneout_c) {
    const at::TensorList weights = at::TensorList(inputs).slice(3);
    const bool proj = weights[1].size(1) * 4 != weights[1].size(0);
    const int64_t per_direction = LayerSizes::weights_per_direction(weights, proj);
    return read_by_backward(requiring_grad(inputs), inputs.size(), per_direction, proj,
                            inputs[0].dim() == 2 || inputs[0].size(0) > 1, zoneout_c,
                            LayerSizes::has_norm(weights));
  }
};

LayerResults layer(const LayerInputs& in, bool keep_cells, bool keep_reserve) {
  // What is recorded of a call must not depend on the grad mode of the moment: keep_reserve is the caller's
  // own wish, and a call that is differentiated keeps one whatever it says.
  const auto requires_grad = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  bool differentiable = in.x.requires_grad() || requires_grad(in.h0) || requires_grad(in.c0);
  for (const at::Tensor& w : in.weights) differentiable |= w.requires_grad();
  if (!differentiable || !at::GradMode::is_enabled()) return below_autograd(in, keep_cells, keep_reserve);
  LayerResults results;
  variable_list out = LayerFunction::apply(in.x, in.h0, in.c0, in.weights, &in, keep_cells, &results);
  auto& [y, h_n, c_n, cells, reserve] = results;
  return {out[0], out[1], out[2], keep_cells ? out[3] : cells, reserve};
}

// LSTMCell's call in one piece: its checks, its autograd node and cpu/one_step.h. Through the layer's op a
// small cell would spend most of its time in views, their autograd nodes and dispatching.

// Whether cpu/one_step.h can read the tensors as they lie: plain, of one type and of the sizes of a cell.
bool fits(const StepInputs& in) {
  const at::ScalarType type = in.x.scalar_type();
  const int64_t dim = in.x.dim();
  if (!(type == at::kFloat || type == at::kDouble) || !(dim == 1 || dim == 2) || in.w_ih.dim() != 2 ||
      in.w_hh.dim() != 2)
    return false;
  const int64_t B = in.B(), H = in.H(), I = in.I();
  const auto state_fits = [&](const at::Tensor& t, int64_t n) {
    return is_plain_tensor(t) && t.scalar_type() == type && t.dim() == dim && t.size(-1) == n &&
           t.numel() == B * n;
  };
  const auto weight_fits = [&](const at::Tensor& w, int64_t n) {
    return is_plain_tensor(w) && w.scalar_type() == type && w.size(0) == 4 * H && w.numel() == 4 * H * n;
  };
  const auto bias_fits = [&](const at::Tensor& w) { return w.dim() == 1 && weight_fits(w, 1); };
  return B > 0 && H > 0 && I > 0 && state_fits(in.x, I) && weight_fits(in.w_ih, I) &&
         weight_fits(in.w_hh, H) && (!in.h0.defined() || (state_fits(in.h0, H) && state_fits(in.c0, H))) &&
         (!in.bias_ih.defined() || (bias_fits(in.bias_ih) && bias_fits(in.bias_hh)));
}

// The parts of a cell's reserve as a layer of one step has them.
at::Tensor gates_of(const at::Tensor& reserve, const StepInputs& in) {
  return reserve.narrow(0, 0, 4 * in.B() * in.H()).view({1, 1, in.B(), 4 * in.H()});
}
at::Tensor cells_of(const at::Tensor& reserve, const StepInputs& in) {
  return reserve.narrow(0, 4 * in.B() * in.H(), in.B() * in.H()).view({1, in.B(), in.H()});
}

// The gradients as differentiable functions of everything, by the layer's formula.
StepGradients differentiable(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& in,
                             const at::Tensor& reserve, const std::array<bool, 7>& needs) {
  static const auto op = find<DifferentiableBackward>("fastlstm::differentiable_backward");
  return through_layer(dh, dc, in, needs,
                       [&](const OptionalTensor& dh_n, const OptionalTensor& dc_n, const at::Tensor& x,
                           const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                           const c10::List<bool>& flags) {
                         const at::Tensor gates = saved_gates(gates_of(reserve, in), x, weights, {});
                         return call(op, {kNoTensor, dh_n, dc_n, kNoTensor},
                                     {x, h0, c0, weights, kNoTensor, kNoTensor}, gates, cells_of(reserve, in),
                                     flags);
                       });
}

// The same as numbers, by the layer's op, for a mode that wants to see ops.
StepGradients by_op(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& in,
                    const at::Tensor& reserve, const std::array<bool, 7>& needs) {
  static const auto op = find<LayerBackward>("fastlstm::native_layer_backward");
  const at::Tensor gates = gates_of(reserve, in), cells = cells_of(reserve, in);
  at::AutoDispatchBelowADInplaceOrView guard;
  return through_layer(dh, dc, in, needs,
                       [&](const OptionalTensor& dh_n, const OptionalTensor& dc_n, const at::Tensor& x,
                           const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                           const c10::List<bool>& flags) {
                         return call(op, {kNoTensor, dh_n, dc_n, kNoTensor},
                                     {x, h0, c0, weights, kNoTensor, kNoTensor}, at::empty({0}, x.options()),
                                     cells, gates, flags);
                       });
}

class CellFunction : public torch::autograd::Function<CellFunction> {
 public:
  // The arguments that `in` holds, which the base class looks for, in StepInputs' order.
  static variable_list forward(AutogradContext* ctx, const StepInputs* in, const at::Tensor&,
                               const OptionalTensor&, const OptionalTensor&, const at::Tensor&,
                               const at::Tensor&, const OptionalTensor&, const OptionalTensor&) {
    const StepResults r = step_forward(*in, true);
    variable_list saved = {in->x, in->h0, in->c0, in->w_ih, in->w_hh, in->bias_ih, in->bias_hh};
    const Arguments needs = requiring_grad(saved);
    set_unread_aside(ctx, saved, read_by_backward(needs, 7, 4, /*proj=*/false, /*steps=*/false));
    saved.push_back(r.reserve);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);  // else an unused h or c would arrive in backward as zeros
    return {r.h, r.c};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list saved = ctx->get_saved_variables();
    const Arguments unread = restore_unread(ctx, saved);
    const auto inputs = [&] {
      return StepInputs{saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6]};
    };
    StepInputs in = inputs();
    std::array<bool, 7> needs;
    size_t edge = 0;  // which exist for the tensors that were given only
    for (size_t k = 0; k < 7; ++k) needs[k] = saved[k].defined() && ctx->needs_input_grad(edge++);
    // Gradients may come as subclasses, with a negation to be done or with a tangent, and a saved-tensor hook
    // may give back anything.
    const auto readable = [](const at::Tensor& t) {
      return !t.defined() || (is_plain_tensor(t) && !t._fw_grad(/*level=*/0).defined());
    };
    TORCH_CHECK(saved[7].numel() == 5 * in.B() * in.H(), "a saved-tensor hook must give back ",
                5 * in.B() * in.H(), " numbers, got ", saved[7].numel());
    const bool raw = !at::GradMode::is_enabled() && readable(grads[0]) && readable(grads[1]) && fits(in) &&
                     is_plain_tensor(saved[7]);
    const at::Tensor reserve = saved[7].contiguous();
    StepGradients found;
    if (!raw) {
      connect_unread(saved, 7, unread);
      in = inputs();
      found = differentiable(grads[0], grads[1], in, reserve, needs);
    } else if (dispatch_mode_active()) {
      found = by_op(grads[0], grads[1], in, reserve, needs);
    } else {
      found = step_backward(grads[0], grads[1], in, reserve, needs);
    }
    variable_list out = {at::Tensor()};  // of `in`
    out.insert(out.end(), std::make_move_iterator(found.begin()), std::make_move_iterator(found.end()));
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, Autograd, m) { m.impl("native_layer", forward_kernel<layer>); }

bool is_plain_tensor(const at::Tensor& t) {
  static const c10::DispatchKeySet keys = at::empty({0}).key_set();
  const c10::DispatchKeySet autograd = c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  return (t.key_set() | autograd) == (keys | autograd);
}

bool dispatch_mode_active() {
  constexpr c10::DispatchKeySet keys{c10::DispatchKey::Python, c10::DispatchKey::Tracer};
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(keys);
}

bool cell_step(const StepInputs& in, at::Tensor& h, at::Tensor& c) {
  if (dispatch_mode_active() || !fits(in)) return false;

  RECORD_FUNCTION("fastlstm::cell", {});
  const auto requires_grad = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
  if (at::GradMode::is_enabled() &&
      (requires_grad(in.x) || requires_grad(in.h0) || requires_grad(in.c0) || requires_grad(in.w_ih) ||
       requires_grad(in.w_hh) || requires_grad(in.bias_ih) || requires_grad(in.bias_hh))) {
    const auto given = [](const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
    const variable_list out = CellFunction::apply(&in, in.x, given(in.h0), given(in.c0), in.w_ih, in.w_hh,
                                                  given(in.bias_ih), given(in.bias_hh));
    h = out[0], c = out[1];
  } else {
    StepResults r = step_forward(in, false);
    h = std::move(r.h), c = std::move(r.c);
  }
  return true;
}

}  // namespace fastlstm
