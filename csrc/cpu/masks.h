// The masks of a call as kernels read them: rows of flags or of Real<T>, a step or row that repeats stored
// once.
#pragma once

#include "cell.h"
#include "cpu/layer.h"

namespace fastlstm {

template <class T>
class LayerMasks {
  using R = Real<T>;

 public:
  explicit LayerMasks(const LayerInputs& in)
      : recurrent_(in.recurrent_mask), zoneout_h_(in.zoneout_h), zoneout_c_(in.zoneout_c) {}

  RowMasks<R> of(int64_t d) const { return {recurrent_.of(d), zoneout_h_.of(d), zoneout_c_.of(d)}; }

 private:
  // [D, T, B, n]
  class Mask {
   public:
    explicit Mask(const OptionalTensor& given) {
      if (!given) return;
      at::Tensor once = *given;
      for (int64_t dim = 0; dim < 3; ++dim)
        if (once.stride(dim) == 0 && once.size(dim) > 1) once = once.narrow(dim, 0, 1);
      const bool flags = once.scalar_type() == at::kBool;
      values_ = flags ? once.contiguous() : to_real<T>(once.contiguous());
      for (int64_t dim = 0; dim < 3; ++dim)
        strides_[dim] = values_.size(dim) == given->size(dim) ? values_.stride(dim) : 0;
    }
    RowMask<R> of(int64_t d) const {
      if (!values_.defined()) return {};
      const bool flags = values_.scalar_type() == at::kBool;
      return {flags ? reinterpret_cast<const uint8_t*>(values_.const_data_ptr<bool>()) + d * strides_[0]
                    : nullptr,
              flags ? nullptr : values_.const_data_ptr<R>() + d * strides_[0], strides_[1], strides_[2]};
    }

   private:
    at::Tensor values_;
    std::array<int64_t, 3> strides_ = {};
  };

  Mask recurrent_, zoneout_h_, zoneout_c_;
};

// after [n], of which a zoneout's share in step t of the caller's row b is kept as it was before, zeros if
// null.
template <class R, class S, class Kept>
void zone(const RowMask<R>& mask, int64_t t, int64_t b, int64_t n, const S* before, Kept* after) {
  const int64_t at = t * mask.step_stride + b * mask.row_stride;
  for (int64_t k = 0; k < n; ++k) {
    const Kept kept = before ? Kept(before[k]) : Kept(0);
    if (mask.flags)
      after[k] = mask.flags[at + k] ? kept : after[k];
    else
      after[k] = Kept(zoned(mask.numbers[at + k], R(kept), R(after[k])));
  }
}

}  // namespace fastlstm
