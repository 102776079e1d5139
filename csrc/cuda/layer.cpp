#include "cuda/layer.h"

#include <ATen/ops/stack.h>

namespace fastlstm::cuda {
namespace {

// Returns the weight as an operand of cuBLAS: contiguous, or its transpose is.
at::Tensor gemm_operand(const at::Tensor& weight) {
  return weight.is_contiguous() || weight.t().is_contiguous() ? weight : weight.contiguous();
}

at::Tensor contiguous_or_undefined(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? tensor->contiguous() : at::Tensor();
}

// A mask [D, T, B, n] as Layer has it. Evaluation with zoneout gives one number that repeats over all
// dimensions.
at::Tensor stored_once(const OptionalTensor& mask) {
  if (!mask || !mask->defined()) return {};
  at::Tensor once = *mask;
  for (int64_t dim = 0; dim < 3; ++dim)
    if (once.stride(dim) == 0 && once.size(dim) > 1) once = once.narrow(dim, 0, 1);
  if (once.stride(3) != 1) once = once.contiguous();
  return once.expand(mask->sizes());
}

}  // namespace

Layer::Layer(const LayerInputs& inputs) : LayerSizes(inputs) {
  dtype = inputs.x.scalar_type(), sum_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  options = inputs.x.options().requires_grad(false), sum_options = options.dtype(sum_dtype);
  for (int64_t d = 0; d < D; ++d) {
    DirectionWeights& w = weights.emplace_back(*this, inputs.weights, d);
    w.ih = gemm_operand(w.ih), w.hh = gemm_operand(w.hh);
    if (bias) w.bias_ih = w.bias_ih.contiguous(), w.bias_hh = w.bias_hh.contiguous();
    for (at::Tensor& vector : w.norm)
      if (norm) vector = vector.contiguous();
    if (proj()) w.hr = gemm_operand(w.hr);
  }
  h0 = contiguous_or_undefined(inputs.h0), c0 = contiguous_or_undefined(inputs.c0);
  lengths = contiguous_or_undefined(inputs.lengths), reset_mask = contiguous_or_undefined(inputs.reset_mask);
  recurrent_mask = stored_once(inputs.recurrent_mask);
  zoneout_h = stored_once(inputs.zoneout_h), zoneout_c = stored_once(inputs.zoneout_c);
  steps = {T, B, in<int64_t>(lengths), in<bool>(reset_mask)};
}

at::Tensor Layer::stacked(at::Tensor DirectionWeights::* weight) const {
  return D == 1 ? weights[0].*weight : at::stack({weights[0].*weight, weights[1].*weight});
}

Mask mask_view(const at::Tensor& mask) {
  if (!mask.defined()) return {};
  return {mask.const_data_ptr(),
          mask.scalar_type() == at::kBool,
          {mask.stride(0), mask.stride(1), mask.stride(2)}};
}

SlotView::SlotView(const at::Tensor& slots)
    : slots_(slots.size(1)), per_slot_(slots.size(2) * slots.size(3)) {
  const int64_t B = slots.size(2), n = slots.size(3);
  view_ = slots.size(0) == 1 ? slots.as_strided({B, n}, {n, 1})
                             : slots.as_strided({2, B, n}, {slots_ * per_slot_, n, 1});
}

const at::Tensor& SlotView::at(const int64_t (&slot)[2]) {
  c10::TensorImpl* const impl = view_.unsafeGetTensorImpl();
  impl->set_storage_offset(slot[0] * per_slot_);
  // slot[0] < slots, so the stride between the directions is positive.
  if (view_.dim() == 3) impl->set_stride(0, (slots_ + slot[1] - slot[0]) * per_slot_);
  return view_;
}

}  // namespace fastlstm::cuda
