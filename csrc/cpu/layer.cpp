// The native ops on CPU tensors, by dtype.
#include <torch/library.h>

#include "cpu/layer.h"

namespace fastlstm {
namespace {

// float16 runs in float32, c and h included, and is rounded once, on the way out.
OptionalTensor to_float(const OptionalTensor& t) { return t ? OptionalTensor(t->to(at::kFloat)) : t; }

std::vector<at::Tensor> to(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(t.to(dtype));
  return out;
}

// f(T{}) for the type that x's kernels store.
template <class F>
auto for_dtype(const at::Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(Bf16{});
    default:
      TORCH_CHECK(false, "x must be floating point, got ", x.scalar_type());
  }
}

LayerResults layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                   at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                   bool keep_cells, bool keep_reserve) {
  const LayerInputs in{x, h0, c0, weights, lengths, reset_mask};
  if (x.scalar_type() != at::kHalf)
    return for_dtype(x, [&](auto t) { return forward<decltype(t)>(in, keep_cells, keep_reserve); });
  const LayerSizes checked(in);  // before all become float32
  auto [y, h_n, c_n, cells, reserve] =
      layer(x.to(at::kFloat), to_float(h0), to_float(c0), to(weights, at::kFloat), lengths, reset_mask,
            keep_cells, keep_reserve);
  return {y.to(at::kHalf), h_n.to(at::kHalf), c_n.to(at::kHalf), cells.to(at::kHalf), reserve.to(at::kHalf)};
}

LayerGradients layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const OptionalTensor& dcells, const at::Tensor& x,
                              const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                              const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                              const at::Tensor& y, const at::Tensor& cells, const at::Tensor& reserve,
                              c10::List<bool> needs) {
  const ResultGradients grads{dy, dh_n, dc_n, dcells};
  const LayerInputs in{x, h0, c0, weights, lengths, reset_mask};
  const SavedResults saved{y, cells, reserve};
  if (x.scalar_type() != at::kHalf)
    return for_dtype(x, [&](auto t) { return backward<decltype(t)>(grads, in, saved, needs); });
  LayerSizes(in).check_backward(x, grads, saved, needs);
  auto [dx, dh0, dc0, dweights] =
      layer_backward(to_float(dy), to_float(dh_n), to_float(dc_n), to_float(dcells), x.to(at::kFloat),
                     to_float(h0), to_float(c0), to(weights, at::kFloat), lengths, reset_mask,
                     y.to(at::kFloat), cells.to(at::kFloat), reserve.to(at::kFloat), needs);
  return {dx.to(at::kHalf), dh0.to(at::kHalf), dc0.to(at::kHalf), to(dweights, at::kHalf)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("native_layer", layer);
  m.impl("native_layer_backward", layer_backward);
}

}  // namespace fastlstm
