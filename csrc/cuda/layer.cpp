#include "cuda/layer.h"

#include <ATen/ops/stack.h>

namespace fastlstm::cuda {
namespace {

// A matrix that a product can read as it lies.
at::Tensor readable(const at::Tensor& weight) {
  return weight.is_contiguous() || weight.t().is_contiguous() ? weight : weight.contiguous();
}

at::Tensor dense(const OptionalTensor& given) {
  return given && given->defined() ? given->contiguous() : at::Tensor();
}

}  // namespace

Layer::Layer(const LayerInputs& given) : LayerSizes(given) {
  dtype = given.x.scalar_type(), sum_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
  options = given.x.options().requires_grad(false), sum_options = options.dtype(sum_dtype);
  for (int64_t d = 0; d < D; ++d) {
    DirectionWeights& w = weights.emplace_back(*this, given.weights, d);
    w.ih = readable(w.ih), w.hh = readable(w.hh);
    if (bias) w.bias_ih = w.bias_ih.contiguous(), w.bias_hh = w.bias_hh.contiguous();
    if (proj()) w.hr = readable(w.hr);
  }
  h0 = dense(given.h0), c0 = dense(given.c0);
  lengths = dense(given.lengths), reset_mask = dense(given.reset_mask);
  steps = {T, B, in<int64_t>(lengths), in<bool>(reset_mask)};
}

at::Tensor Layer::stacked(at::Tensor DirectionWeights::* weight) const {
  return D == 1 ? weights[0].*weight : at::stack({weights[0].*weight, weights[1].*weight});
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
  // slot[0] < slots, so the distance from one direction's rows to the other's is positive.
  if (view_.dim() == 3) impl->set_stride(0, (slots_ + slot[1] - slot[0]) * per_slot_);
  return view_;
}

}  // namespace fastlstm::cuda
