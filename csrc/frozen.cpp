// The op fastlstm::frozen_layer: a layer whose weights are packed (cpu/packed.h), for inference on CPU.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include "cpu/layer.h"
#include "frozen.h"

namespace fastlstm {
namespace {

FrozenResults layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                    const at::Tensor& packed, at::IntArrayRef sizes, const OptionalTensor& lengths,
                    const OptionalTensor& reset_mask, bool keep_cells) {
  const PackedView view(packed);
  const PackedHeader& header = view.header();
  TORCH_CHECK(sizes == at::IntArrayRef({header.H, header.P, header.D}), "sizes must be [H, P, D] = [",
              header.H, ", ", header.P, ", ", header.D, "], got ", sizes);
  if (!is_native(header))
    return layer(x, h0, c0, packed_here(packed), sizes, lengths, reset_mask, keep_cells);
  const LayerInputs in{x, h0, c0, {}, lengths, reset_mask};
  auto [y, h_n, c_n, cells, reserve] = run_frozen(in, view, keep_cells, {});
  return {y, h_n, c_n, keep_cells ? cells : new_empty({0}, x)};
}

// Results that depend on a tensor that requires a gradient may be used; to ask for the gradient raises.
class FrozenFunction : public torch::autograd::Function<FrozenFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext*, const at::Tensor& x,
                                                const OptionalTensor& h0, const OptionalTensor& c0,
                                                const at::Tensor& packed, at::IntArrayRef sizes,
                                                const OptionalTensor& lengths,
                                                const OptionalTensor& reset_mask, bool keep_cells) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, h_n, c_n, cells] = frozen_op().call(x, h0, c0, packed, sizes, lengths, reset_mask, keep_cells);
    return {y, h_n, c_n, cells};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 const torch::autograd::variable_list&) {
    TORCH_CHECK(false,
                "a frozen LSTM has no gradient: call it under torch.no_grad(), or make it trainable by "
                "fastlstm.thaw(model)");
  }
};

FrozenResults layer_autograd(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                             const at::Tensor& packed, at::IntArrayRef sizes, const OptionalTensor& lengths,
                             const OptionalTensor& reset_mask, bool keep_cells) {
  const auto requires_grad = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  const auto has_tangent = [](const OptionalTensor& t) { return t && t->_fw_grad(/*level=*/0).defined(); };
  TORCH_CHECK(!(has_tangent(x) || has_tangent(h0) || has_tangent(c0)),
              "a frozen LSTM has no derivative: make it trainable by fastlstm.thaw(model)");
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || requires_grad(h0) || requires_grad(c0))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return frozen_op().call(x, h0, c0, packed, sizes, lengths, reset_mask, keep_cells);
  }
  const auto out = FrozenFunction::apply(x, h0, c0, packed, sizes, lengths, reset_mask, keep_cells);
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace

LayerResults run_frozen(const LayerInputs& in, const PackedView& packed, bool keep_cells,
                        const GivenResults& given) {
  switch (packed.header().scalar_type()) {
    case at::kFloat:
      return forward_frozen<float>(in, packed, keep_cells, given);
    case at::kDouble:
      return forward_frozen<double>(in, packed, keep_cells, given);
    default:
      return forward_frozen<Bf16>(in, packed, keep_cells, given);
  }
}

const c10::TypedOperatorHandle<FrozenForward>& frozen_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::frozen_layer", "").typed<FrozenForward>();
  return op;
}

void define_frozen(py::module_& m) {
  m.def(
      "pack_layer",
      [](py::object dtype, const std::string& form, const std::vector<at::Tensor>& weights,
         const std::vector<at::Tensor>& scales) {
        TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "dtype must be a torch.dtype");
        const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
        return pack_layer(type, frozen_named(form), weights, scales);
      },
      "The bytes of a frozen layer.");
  m.def("unpack_layer", &unpack_layer, "(weights, scales) of them.");
  m.def("packed_is_native", [](const at::Tensor& packed) { return is_native(PackedView(packed).header()); });
  m.def("int8_isa", [] { return int8::kernels().name; }, "The instructions of int8 products.");
  m.def(
      "int8_sums",
      [](const at::Tensor& x, const at::Tensor& packed) {
        const PackedView view(packed);
        TORCH_CHECK(view.header().layout == PackedLayout::int8_blocks && is_native(view.header()),
                    "packed must be an int8 layer for this machine");
        TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == at::kFloat &&
                        x.sizes() == at::IntArrayRef({view.header().I}),
                    "x must be float32 [I] = [", view.header().I, "], got ", x.scalar_type(), " ", x.sizes());
        const int64_t K = view.header().I, W = view.header().width, H = view.header().H;
        const int8::Weight all = view.int8_weight(PackedWeight::ih, 0);
        at::Tensor sums = at::empty({4 * H}, at::kInt), scale = at::empty({1}, at::kFloat);
        std::vector<uint8_t> scratch(int8::sums_scratch(K));
        std::vector<int32_t> block(4 * W);
        for (int64_t u0 = 0; u0 < H; u0 += W) {
          const int64_t b = u0 / W;
          int8::kernels().block_sums(K, x.const_data_ptr<float>(),
                                     {all.packed + b * int8::block_size(K, int8::kernels().layout),
                                      all.scale + b * 4 * W, all.offset + b * 4 * W},
                                     scratch.data(), block.data(), scale.mutable_data_ptr<float>());
          for (int64_t gate = 0; gate < 4; ++gate)
            for (int64_t u = u0; u < std::min(H, u0 + W); ++u)
              sums.mutable_data_ptr<int32_t>()[gate * H + u] = block[gate * W + u - u0];
        }
        return std::make_tuple(sums, scale);
      },
      "The sums [4H] of quantized x [I] with the int8 weight_ih of a frozen layer, and x's scale, for "
      "tests.");
}

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) { m.impl("frozen_layer", layer); }
TORCH_LIBRARY_IMPL(fastlstm, Autograd, m) { m.impl("frozen_layer", layer_autograd); }

}  // namespace fastlstm
