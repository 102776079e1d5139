// The WeightGradient of FloatEngine (cpu/engine_float.h): products summed over chunks of steps.
#pragma once

#include <ATen/ops/zeros_like.h>

#include "cpu/engine.h"

namespace fastlstm {

// A weight's gradient dw [m, n], summed over the chunks of steps: dgates [rows, m]^T times states [rows, n].
// If the plan says at_once, add() is called once.
template <class T>
class FloatWeightGradient {
  using R = Real<T>;
  static constexpr bool kNarrow = std::is_same_v<T, Bf16>;

 public:
  FloatWeightGradient(const at::Tensor& dw, const WgradPlan& plan)
      : dw_(dw), sum_(dw), in_blocks_(kNarrow && plan.at_once), transposed_(plan.transposed) {
    const int64_t m = dw.size(transposed_), n = dw.size(!transposed_);
    if (plan.gemm == Gemm::aligned_blas)
      sum_ = new_aligned(m, n, real_like<T>(dw));
    else if (transposed_ || (kNarrow && !in_blocks_))
      sum_ = new_empty({m, n}, real_like<T>(dw));
    if (plan.float64) total_ = at::zeros_like(sum_, at::kDouble);
  }

  void add(int64_t rows, MatrixView<R> dgates, MatrixView<R> states, bool accumulate) {
    if constexpr (kNarrow)
      if (in_blocks_) return multiply_in_blocks(rows, dgates, states);
    const int64_t m = dw_.size(0), n = dw_.size(1), block = total_.defined() ? kFloat64WgradBlockRows : rows;
    R* out = sum_.mutable_data_ptr<R>();
    const int64_t stride = sum_.stride(0);
    if (rows == 0 && !accumulate) sum_.zero_();
    for (int64_t r = 0; r < rows; r += block) {
      const int64_t depth = std::min(block, rows - r);
      const MatrixView<R> left = dgates.from(r), right = states.from(r);
      const bool onto = accumulate && !total_.defined();
      if (transposed_)
        multiply<R>({n, m, depth, right.data, right.stride, true, left.data, left.stride, onto, out, stride,
                     nullptr});
      else
        multiply<R>({m, n, depth, left.data, left.stride, true, right.data, right.stride, onto, out, stride,
                     nullptr});
      if (total_.defined()) total_.add_(sum_);
    }
  }

  void finish() {
    const at::Tensor sum = total_.defined() ? std::move(total_) : std::move(sum_);  // released here
    if (sum.is_same(dw_)) return;
    const at::Tensor dw = transposed_ ? sum.t() : sum;
    dw_.copy_(kNarrow && transposed_ ? dw.contiguous() : dw);  // a copy that transposes and rounds is slow
  }

 private:
  // All N rows at once, some rows of dw at a time, so that these are rounded while a cache holds them. Sums
  // over several calls would be rounded in each.
  void multiply_in_blocks(int64_t rows, MatrixView<R> dgates, MatrixView<R> states) {
    const int64_t m = dw_.size(0), n = dw_.size(1),
                  block = std::max<int64_t>(1, kBf16WgradBlockElements / std::max<int64_t>(16, n) / 16) * 16;
    if (rows == 0) {
      dw_.zero_();
      return;
    }
    T* out = writable<T>(dw_);
    for_blocks(at::get_num_threads(), m, block, block * n * rows, [&](int64_t begin, int64_t end) {
      thread_local std::vector<R> sums;
      sums.resize(std::max<size_t>(sums.size(), block * n));
      for (int64_t j = begin; j < end; j += block) {
        const int64_t count = std::min(block, end - j);
        multiply<R>({count, n, rows, dgates.data + j, dgates.stride, true, states.data, states.stride, false,
                     sums.data(), n, nullptr});
        copy_numbers(sums.data(), count * n, out + j * n);
      }
    });
  }

  at::Tensor dw_, sum_, total_;
  bool in_blocks_, transposed_;
};

}  // namespace fastlstm
