#include "cuda/layer.h"

#include <ATen/ops/stack.h>

namespace fastlstm::cuda {
namespace {

void expect(const at::Tensor& tensor, const char* name, const char* sizes, at::IntArrayRef shape,
            const at::Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK(tensor.sizes() == shape, name, " must be ", sizes, " = ", shape, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.device() == like.device(), name, " must be on ", like.device(), ", got ",
              tensor.device());
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

// A weight that a product can read as it lies.
at::Tensor readable(const at::Tensor& weight) {
  return weight.is_contiguous() || weight.t().is_contiguous() ? weight : weight.contiguous();
}

}  // namespace

Layer::Layer(const at::Tensor& x, at::TensorList list, const OptionalTensor& given_lengths,
             const OptionalTensor& given_mask) {
  TORCH_CHECK(x.dim() == 3, "x must be [T, B, I], got ", x.sizes());
  TORCH_CHECK(list.size() >= 2 && list[1].dim() == 2, "weights must hold weight_ih and weight_hh, got ",
              list.size());
  T = x.size(0), B = x.size(1), I = x.size(2);
  H = list[1].size(0) / 4, P = list[1].size(1);
  projected = P != H;
  bias = list.size() > 2 && list[2].dim() == 1;
  per_direction = 2 + 2 * bias + projected;
  D = static_cast<int>(list.size() / per_direction);
  TORCH_CHECK((D == 1 || D == 2) && list.size() == static_cast<size_t>(D * per_direction), "weights must be ",
              per_direction, " for each of 1 or 2 directions, got ", list.size());
  options = x.options().requires_grad(false);
  const at::ScalarType dtype = x.scalar_type();
  accumulated = options.dtype(dtype == at::kDouble ? at::kDouble : at::kFloat);
  for (int d = 0; d < D; ++d) {
    const at::Tensor* w = &list[d * per_direction];
    expect(w[0], "weight_ih", "[4H, I]", {4 * H, I}, x, dtype);
    expect(w[1], "weight_hh", "[4H, P]", {4 * H, P}, x, dtype);
    weights[d].ih = readable(w[0]), weights[d].hh = readable(w[1]);
    if (bias) {
      expect(w[2], "bias_ih", "[4H]", {4 * H}, x, dtype);
      expect(w[3], "bias_hh", "[4H]", {4 * H}, x, dtype);
      weights[d].bias_ih = w[2].contiguous(), weights[d].bias_hh = w[3].contiguous();
    }
    if (projected) {
      expect(w[per_direction - 1], "weight_hr", "[P, H]", {P, H}, x, dtype);
      weights[d].hr = readable(w[per_direction - 1]);
    }
  }
  if (given_lengths && given_lengths->defined()) {
    expect(*given_lengths, "lengths", "[B]", {B}, x, at::kLong);
    lengths = given_lengths->contiguous();
  }
  if (given_mask && given_mask->defined()) {
    expect(*given_mask, "reset_mask", "[T, B]", {T, B}, x, at::kBool);
    reset_mask = given_mask->contiguous();
  }
  steps = {T, B, in<int64_t>(lengths), in<bool>(reset_mask)};
}

at::Tensor Layer::stacked(at::Tensor DirectionWeights::* weight) const {
  return D == 1 ? weights[0].*weight : at::stack({weights[0].*weight, weights[1].*weight});
}

at::Tensor Layer::state(const OptionalTensor& given, int64_t n, const char* name) const {
  if (!given || !given->defined()) return {};
  TORCH_CHECK(given->sizes() == at::IntArrayRef({D, B, n}) && given->dtype() == options.dtype(), name,
              " must be ", options.dtype(), " ", at::IntArrayRef({D, B, n}), ", got ", given->dtype(), " ",
              given->sizes());
  return given->contiguous();
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
