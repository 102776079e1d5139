// One layer on the device: its sizes, weights and masks as the kernels and the products read them, and its
// two passes.
#pragma once

#include "contract.h"
#include "cuda/cell_kernels.h"

namespace fastlstm::cuda {

// Buffers that hold some steps at a time are about this large: x W_ih^T of those steps is two waves of
// tiles of a product on the largest GPUs, and stays in L2 until the cell kernels have read it.
#ifndef FASTLSTM_CUDA_CHUNK_BYTES  // the tests set a small one, so that small cases run in chunks
#define FASTLSTM_CUDA_CHUNK_BYTES (32 << 20)
#endif
constexpr int64_t kChunkBytes = FASTLSTM_CUDA_CHUNK_BYTES;

struct Layer : LayerSizes {
  explicit Layer(const LayerInputs& given);

  at::ScalarType dtype, sum_dtype;  // of the tensors, and of sums and carried state (Acc in cell_kernels.h)
  at::TensorOptions options, sum_options;
  std::vector<DirectionWeights> weights;  // [D]; biases dense, matrices as a product can read them
  at::Tensor h0, c0;                      // dense, or undefined for zeros
  at::Tensor lengths, reset_mask;         // dense, or undefined
  Steps steps;

  bool ragged() const { return lengths.defined() || reset_mask.defined(); }

  // [D, B, n] in the shape of one product for all directions: [B, n] for one direction.
  at::Tensor per_product(const at::Tensor& state) const { return D == 1 ? state.select(0, 0) : state; }
  // A weight of all directions as the operand of such a product; one copy for the whole sequence where D = 2.
  at::Tensor stacked(at::Tensor DirectionWeights::* weight) const;
};

// The operand of the steps' products within [D, slots, B, n]: [B, n], or [2, B, n] with each direction at its
// own slot. It is one tensor moved from step to step, since making a view costs more host time than launching
// a kernel.
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

// f(a null pointer to the kernels' type T of a dtype).
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

LayerForward layer_forward;
LayerBackward layer_backward;

}  // namespace fastlstm::cuda
