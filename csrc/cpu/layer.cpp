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

LayerResults layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                   at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                   bool keep_cells, bool keep_reserve) {
  const at::ScalarType dtype = x.scalar_type();
  if (dtype == at::kFloat)
    return forward<float>(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
  if (dtype == at::kDouble)
    return forward<double>(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "x must be floating point, got ", dtype);
  if (dtype == at::kBFloat16)
    return forward<Bf16>(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
  const LayerSizes s(x, weights, lengths);
  s.check_inputs(x, h0, c0, lengths, reset_mask);  // before all become float32
  auto [y, h_n, c_n, cells, reserve] =
      forward<float>(x.to(at::kFloat), to_float(h0), to_float(c0), to(weights, at::kFloat), lengths,
                     reset_mask, keep_cells, keep_reserve);
  return {y.to(dtype), h_n.to(dtype), c_n.to(dtype), cells.to(dtype), reserve.to(dtype)};
}

LayerGradients layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const OptionalTensor& dcells, const at::Tensor& x,
                              const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                              const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                              const at::Tensor& y, const at::Tensor& cells, const at::Tensor& reserve,
                              c10::List<bool> needs) {
  const at::ScalarType dtype = x.scalar_type();
  if (dtype == at::kFloat)
    return backward<float>(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, y, cells, reserve,
                           needs);
  if (dtype == at::kDouble)
    return backward<double>(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, y, cells,
                            reserve, needs);
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "x must be floating point, got ", dtype);
  if (dtype == at::kBFloat16)
    return backward<Bf16>(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, y, cells, reserve,
                          needs);
  const LayerSizes s(x, weights, lengths);
  s.check_backward(x, dy, dh_n, dc_n, dcells, y, cells, reserve, needs);
  auto [dx, dh0, dc0, dweights] =
      backward<float>(to_float(dy), to_float(dh_n), to_float(dc_n), to_float(dcells), x.to(at::kFloat),
                      to_float(h0), to_float(c0), to(weights, at::kFloat), lengths, reset_mask,
                      y.to(at::kFloat), cells.to(at::kFloat), reserve.to(at::kFloat), needs);
  return {dx.to(dtype), dh0.to(dtype), dc0.to(dtype), to(dweights, dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("native_layer", layer);
  m.impl("native_layer_backward", layer_backward);
}

}  // namespace fastlstm
