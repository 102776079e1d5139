// One layer's sizes, weights and buffers, read off the arguments of the op (fastlstm/ops/schema.py); its two
// passes.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/cell_kernels.h"

namespace fastlstm::cuda {

using OptionalTensor = std::optional<at::Tensor>;

struct DirectionWeights {
  at::Tensor ih, hh;            // [4H, I], [4H, P]
  at::Tensor bias_ih, bias_hh;  // [4H], dense, or undefined
  at::Tensor hr;                // [P, H], or undefined
};

struct Layer {
  Layer(const at::Tensor& x, at::TensorList weights, const OptionalTensor& lengths,
        const OptionalTensor& reset_mask);

  int64_t T, B, I, H, P;
  int D;
  bool bias, projected;
  int64_t per_direction;  // weights of one direction in the list
  at::TensorOptions options,
      accumulated;  // of the tensors, and of sums and carried state (Acc in cell_kernels.h)
  std::array<DirectionWeights, 2> weights;
  at::Tensor lengths, reset_mask;  // int64 [B], bool [T, B], dense, or undefined
  Steps steps;

  bool ragged() const { return lengths.defined() || reset_mask.defined(); }

  // [D, B, n] in the shape of one product for all directions: [B, n] for one direction.
  at::Tensor per_product(const at::Tensor& state) const { return D == 1 ? state.select(0, 0) : state; }
  // A weight of every direction as the operand of such a product; one copy for the whole sequence where D
  // = 2.
  at::Tensor stacked(at::Tensor DirectionWeights::* weight) const;
  // An initial state or its gradient, [D, B, n] dense; undefined for none.
  at::Tensor state(const OptionalTensor& given, int64_t n, const char* name) const;
};

// The operand of the steps' products within [D, slots, B, n]: [B, n], or [2, B, n] with each direction at its
// own slot. It is one tensor moved from step to step, since making a view costs more host time than launching
// a kernel.
class SlotView {
 public:
  SlotView(const at::Tensor& slots);
  const at::Tensor& at(const int64_t (&slot)[2]);

 private:
  int64_t slots_, per_slot_;
  at::Tensor view_;
};

// Pointers for the kernels; null for an undefined tensor.
template <class T>
const T* in(const at::Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <class T>
T* out(const at::Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// f.template operator()<T>() for the kernels' type T of a dtype.
template <class F>
auto for_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f(static_cast<float*>(nullptr));
    case at::kDouble:
      return f(static_cast<double*>(nullptr));
    case at::kHalf:
      return f(static_cast<__half*>(nullptr));
    case at::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    default:
      TORCH_CHECK(false, "x must be float32, float64, float16 or bfloat16, got ", dtype);
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> layer_forward(
    const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& lengths, const OptionalTensor& reset_mask, bool keep_cells, bool keep_reserve);

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> layer_backward(
    const OptionalTensor& dy, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
    const OptionalTensor& dcells, const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
    at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
    const at::Tensor& y, const at::Tensor& cells, const at::Tensor& reserve, const c10::List<bool>& needs);

}  // namespace fastlstm::cuda
