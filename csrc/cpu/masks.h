// The masks of a call as kernels read them: rows of flags or of Real<T>, a step or row that repeats stored
// once.
#pragma once

#include <ATen/ops/mm.h>

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

// after [n], of which a zoneout's share in step t of the caller's row b is kept as it was before.
template <class R>
void zone(const RowMask<R>& mask, int64_t t, int64_t b, int64_t n, const R* before, R* after) {
  const int64_t at = t * mask.step_stride + b * mask.row_stride;
  for (int64_t k = 0; k < n; ++k) {
    if (mask.flags)
      after[k] = mask.flags[at + k] ? before[k] : after[k];
    else
      after[k] = zoned(mask.numbers[at + k], before[k], after[k]);
  }
}

// output_again (cpu/chunks.h) of a layer with zoneout or layer normalization: h = o * tanh(c), c before its
// zoneout and normalized, and its projection; then the zoneout of h, step by step.
template <class T>
at::Tensor zoned_output_again(const LayerSizes& s, const Ragged& ragged, const LayerInputs& in,
                              const LayerMasks<T>& all_masks, const SavedResults& saved, int64_t block) {
  using R = Real<T>;
  const int64_t H = s.H, P = s.P, D = s.D;
  const at::Tensor y =
      ragged.padded() ? new_zeros(s.per_row(D * P), in.x) : new_empty(s.per_row(D * P), in.x);
  const OptionalTensor h0 = contiguous(in.h0), c0 = contiguous(in.c0);
  for (int64_t d = 0; d < D; ++d) {
    const Rows rows = ragged.rows(d);
    const RowMasks<R> masks = all_masks.of(d);
    // The state of the previous step in `states`, or the first, or null for zeros.
    const auto before = [&](const at::Tensor& states, const OptionalTensor& first, int64_t n, int64_t t,
                            int64_t r) -> const T* {
      const int64_t last = d == 1 ? t + 1 : t - 1;
      if (rows.fresh_at(t, r)) return nullptr;
      if (last >= 0 && last < s.T && r < rows.count_at(last))
        return data_of<T>(states) + rows.row_at(last, r) * D * n + d * n;
      return first ? data_of<T>(*first) + (d * s.B + rows.batch_row_at(r)) * n : nullptr;
    };
    const auto read = [](const T* from, int64_t n, R* to) {
      from ? copy_numbers(from, n, to) : static_cast<void>(std::fill_n(to, n, R(0)));
    };
    at::Tensor h = new_empty({std::max<int64_t>(1, ragged.N()), H}, real_like<T>(in.x));  // packed rows
    R* hidden = h.mutable_data_ptr<R>();
    const T* reserve = data_of<T>(saved.reserve) + d * s.rows() * s.reserved();
    const LayerNorm<T> layer_norm =
        s.norm ? LayerNorm<T>(DirectionWeights(s, in.weights, d)) : LayerNorm<T>();
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t t, int64_t r) {
      std::vector<R> gates(4 * H), c(H);
      copy_numbers(reserve + packed_row * 4 * H, 4 * H, gates.data());
      R* to = hidden + packed_row * H;
      read(masks.zoneout_c ? before(saved.cells, c0, H, t, r) : data_of<T>(saved.cells) + row * D * H + d * H,
           H, c.data());
      for (int64_t u = 0; u < H; u += block) {
        const int64_t n = std::min(block, H - u);
        const R* i = gates.data() + 4 * u;
        for (int64_t k = 0; masks.zoneout_c && k < n; ++k)
          c[u + k] = i[n + k] * c[u + k] + i[k] * i[2 * n + k];
      }
      if (s.norm) {
        const NormWeights<R> norm = layer_norm.weights();
        kernels<R>().normalize(c.data(), H, norm.gain_c, norm.bias_c);
      }
      kernels<R>().tanh(c.data(), to, H);
      for (int64_t u = 0; u < H; u += block)
        for (int64_t k = 0, n = std::min(block, H - u); k < n; ++k) to[u + k] *= gates[4 * u + 3 * n + k];
    });
    if (s.proj()) h = at::mm(h, to_real<T>(DirectionWeights(s, in.weights, d).hr.contiguous()).t());
    R* candidates = h.mutable_data_ptr<R>();
    at::parallel_for(0, s.B, 1, [&](int64_t begin, int64_t end) {
      std::vector<R> last(P);
      for (int64_t r = begin; r < end; ++r)
        for (int64_t k = 0, n = ragged.length(r); k < n; ++k) {
          const int64_t t = d == 1 ? n - 1 - k : k;
          R* now = candidates + (rows.offset_at(t) + r) * P;
          if (masks.zoneout_h) {
            read(before(y, h0, P, t, r), P, last.data());
            zone(masks.zoneout_h, t, rows.batch_row_at(r), P, last.data(), now);
          }
          copy_numbers(now, P, writable<T>(y) + rows.row_at(t, r) * D * P + d * P);
        }
    });
  }
  return y;
}

}  // namespace fastlstm
