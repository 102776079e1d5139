// One layer on the device: its sizes, weights and masks as the kernels and the GEMMs read them, and its two
// passes.
#pragma once

#include "contract.h"
#include "cuda/cell_kernels.h"
#include "cuda/tuning.h"

namespace fastlstm::cuda {

struct Layer : LayerSizes {
  explicit Layer(const LayerInputs& inputs);

  at::ScalarType dtype, sum_dtype;  // of the tensors; of sums and carried state (Acc in cell_kernels.h)
  at::TensorOptions options, sum_options;
  std::vector<DirectionWeights> weights;  // [D]; vectors contiguous, matrices as operands of cuBLAS
  at::Tensor h0, c0;                      // contiguous, or undefined for zeros
  at::Tensor lengths, reset_mask;         // contiguous, or undefined
  // [D, T, B, n], or undefined; the last stride is 1, and what repeats over D, T or B is stored once.
  at::Tensor recurrent_mask, zoneout_h, zoneout_c;
  Steps steps;

  bool ragged() const { return lengths.defined() || reset_mask.defined(); }
  bool masked() const { return recurrent_mask.defined() || zoneout_h.defined() || zoneout_c.defined(); }

  // [D, B, n] as the operand of one GEMM for all directions: [B, n] for one direction.
  at::Tensor batched_operand(const at::Tensor& state) const { return D == 1 ? state.select(0, 0) : state; }
  // The same for a weight; one copy for the whole sequence if D = 2.
  at::Tensor stacked(at::Tensor DirectionWeights::* weight) const;
};

// The operand of a step's GEMM within [D, slots, B, n]: [B, n], or [2, B, n] with each direction at its own
// slot. One tensor is moved from step to step, because creating a view costs more host time than launching a
// kernel.
class SlotView {
 public:
  explicit SlotView(const at::Tensor& slots);
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

template <class T>
NormWeights<T> norm_weights(const DirectionWeights& w) {
  const auto& n = w.norm;
  return {in<T>(n[0]), in<T>(n[1]), in<T>(n[2]), in<T>(n[3]), in<T>(n[4]), in<T>(n[5])};
}

// One of Layer's masks, or an undefined tensor, for the kernels.
Mask mask_view(const at::Tensor& mask);

// Calls f with a null pointer to the kernels' type T of the dtype.
template <class F>
void for_dtype(at::ScalarType dtype, F&& f) {
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

LayerResults layer_forward(const LayerInputs& in, bool keep_cells, bool keep_reserve);
LayerGradients layer_backward(const ResultGradients& grads, const LayerInputs& in, const SavedResults& saved,
                              const c10::List<bool>& needs);

}  // namespace fastlstm::cuda
