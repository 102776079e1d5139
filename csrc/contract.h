// The contract of fastlstm/ops/schema.py in C++: signatures of the native ops and a view of a layer's
// weights.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastlstm {

using OptionalTensor = std::optional<at::Tensor>;

// y, h_n, c_n, cells, reserve
using LayerResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LayerForward = LayerResults(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                  at::TensorList weights, const OptionalTensor& lengths,
                                  const OptionalTensor& reset_mask, bool keep_cells, bool keep_reserve);

// dx, dh0, dc0, dweights
using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
using LayerBackward = LayerGradients(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                     const OptionalTensor& dc_n, const OptionalTensor& dcells,
                                     const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                     at::TensorList weights, const OptionalTensor& lengths,
                                     const OptionalTensor& reset_mask, const at::Tensor& y,
                                     const at::Tensor& cells, const at::Tensor& reserve,
                                     c10::List<bool> needs);

// dx, dh0, dc0, dweights as differentiable functions (fastlstm/ops/register.py)
using DifferentiableBackward = LayerGradients(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                              const OptionalTensor& dc_n, const OptionalTensor& dcells,
                                              const at::Tensor& x, const OptionalTensor& h0,
                                              const OptionalTensor& c0, at::TensorList weights,
                                              const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                                              c10::List<bool> needs);

// The sizes of a layer, read off x and its weights.
struct LayerSizes {
  int64_t T, B, I, H, P, D;
  int64_t per_direction;  // weights of one direction
  bool bias;

  bool proj() const { return P != H; }
  int64_t rows() const { return T * B; }

  LayerSizes(const at::Tensor& x, at::TensorList weights) {
    TORCH_CHECK(x.dim() == 3, "x must be [T, B, I], got ", x.sizes());
    TORCH_CHECK(weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
                "weights must begin with weight_ih [4H, I] and weight_hh [4H, P]");
    T = x.size(0), B = x.size(1), I = x.size(2);
    TORCH_CHECK(T > 0, "Expected sequence length to be larger than 0 in RNN");
    H = weights[0].size(0) / 4, P = weights[1].size(1);
    bias = weights.size() > 2 && weights[2].dim() == 1;
    per_direction = 2 + 2 * bias + (P != H);
    D = static_cast<int64_t>(weights.size()) / per_direction;
    TORCH_CHECK(D * per_direction == static_cast<int64_t>(weights.size()) && (D == 1 || D == 2),
                "weights must be ", per_direction, " tensors for each of 1 or 2 directions, got ",
                weights.size());
    for (int64_t d = 0; d < D; ++d) {
      check("weight_ih", weights[d * per_direction], {4 * H, I});
      check("weight_hh", weights[d * per_direction + 1], {4 * H, P});
      if (bias) check("bias_ih", weights[d * per_direction + 2], {4 * H});
      if (bias) check("bias_hh", weights[d * per_direction + 3], {4 * H});
      if (proj()) check("weight_hr", weights[(d + 1) * per_direction - 1], {P, H});
    }
    for (const at::Tensor& w : weights)
      TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.device() == x.device(), "weights must be ",
                  x.scalar_type(), " on ", x.device(), " as x is, got ", w.scalar_type(), " on ", w.device());
  }

  static void check(const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
    TORCH_CHECK(tensor.sizes() == expected, name, " must be ", expected, ", got ", tensor.sizes());
  }
  static void check(const char* name, const OptionalTensor& tensor, at::IntArrayRef expected,
                    at::ScalarType dtype, const at::Tensor& x) {
    if (!tensor) return;
    check(name, *tensor, expected);
    TORCH_CHECK(tensor->scalar_type() == dtype && tensor->device() == x.device(), name, " must be ", dtype,
                " on ", x.device(), ", got ", tensor->scalar_type(), " on ", tensor->device());
  }
  void check_inputs(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                    const OptionalTensor& lengths, const OptionalTensor& reset_mask) const {
    check("h0", h0, {D, B, P}, x.scalar_type(), x);
    check("c0", c0, {D, B, H}, x.scalar_type(), x);
    check("lengths", lengths, {B}, at::kLong, x);
    check("reset_mask", reset_mask, {T, B}, at::kBool, x);
  }
  // What backward takes beyond forward's arguments.
  void check_backward(const at::Tensor& x, const OptionalTensor& dy, const OptionalTensor& dh_n,
                      const OptionalTensor& dc_n, const OptionalTensor& dcells, const at::Tensor& y,
                      const at::Tensor& cells, const at::Tensor& reserve,
                      const c10::List<bool>& needs) const {
    const at::ScalarType dtype = x.scalar_type();
    TORCH_CHECK(reserve.numel() == D * rows() * 4 * H, "reserve must be kept by forward for a backward");
    check("reserve", reserve, {D, T, B, 4 * H}, dtype, x);
    check("y", y, {T, B, D * P}, dtype, x);
    check("cells", cells, {T, B, D * H}, dtype, x);
    check("dy", dy, {T, B, D * P}, dtype, x);
    check("dh_n", dh_n, {D, B, P}, dtype, x);
    check("dc_n", dc_n, {D, B, H}, dtype, x);
    check("dcells", dcells, {T, B, D * H}, dtype, x);
    const size_t flags = 3 + D * per_direction;
    TORCH_CHECK(needs.size() == flags, "needs must have ", flags, " flags, got ", needs.size());
  }
};

// The weights of direction d.
struct DirectionWeights {
  at::Tensor ih, hh, bias_ih, bias_hh, hr;  // undefined where absent

  DirectionWeights(const LayerSizes& s, at::TensorList weights, int64_t d) {
    const at::Tensor* w = weights.data() + d * s.per_direction;
    ih = w[0], hh = w[1];
    if (s.bias) bias_ih = w[2], bias_hh = w[3];
    if (s.proj()) hr = w[s.per_direction - 1];
  }
};

}  // namespace fastlstm
