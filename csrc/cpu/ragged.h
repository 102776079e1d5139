// lengths and reset_mask as the kernels want them: sorted rows, counts and offsets per step, fresh steps.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "contract.h"
#include "cpu/sequence.h"

namespace fastlstm {

class Ragged {
 public:
  Ragged(const LayerSizes& s, const OptionalTensor& lengths, const OptionalTensor& reset_mask)
      : T_(s.T), B_(s.B), N_(s.rows()), packed_(s.packed) {
    if (lengths) sort(lengths->contiguous());
    if (reset_mask)
      for (int64_t d = 0; d < s.D; ++d) fresh_[d] = fresh_steps(reset_mask->contiguous(), d == 1);
  }

  int64_t N() const { return N_; }
  bool ragged() const { return !count_.empty(); }
  // Whether the caller's rows include some past a length.
  bool padded() const { return ragged() && !packed_; }
  bool plain() const { return !ragged() && fresh_[0].empty(); }

  Rows rows(int64_t d) const {
    const auto data = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
    return {T_, B_, N_, data(count_), data(offset_), data(batch_row_), data(fresh_[d]), packed_};
  }
  int64_t length(int64_t r) const { return ragged() ? length_[r] : T_; }

  // Calls f(packed row, the caller's row, t, sorted row) for every step of every row, in parallel over steps.
  template <class F>
  void for_each_row(F&& f) const {
    const Rows rows = this->rows(0);
    at::parallel_for(0, T_, std::max<int64_t>(1, kRowCopyTaskMinRows / std::max<int64_t>(1, B_)),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t t = begin; t < end; ++t)
                         for (int64_t r = 0, n = rows.count_at(t), offset = rows.offset_at(t); r < n; ++r)
                           f(offset + r, rows.row_at(t, r), t, r);
                     });
  }

 private:
  void sort(const at::Tensor& lengths) {
    const int64_t* given = lengths.const_data_ptr<int64_t>();
    for (int64_t b = 0; b < B_; ++b)
      TORCH_CHECK_VALUE(given[b] >= 0 && given[b] <= T_, "lengths must lie in [0, T=", T_, "], got ",
                        given[b], " in row ", b);
    if (std::all_of(given, given + B_, [&](int64_t n) { return n == T_; })) return;
    batch_row_.resize(B_);
    std::iota(batch_row_.begin(), batch_row_.end(), 0);
    std::stable_sort(batch_row_.begin(), batch_row_.end(),
                     [&](int64_t a, int64_t b) { return given[a] > given[b]; });
    length_.resize(B_);
    for (int64_t r = 0; r < B_; ++r) length_[r] = given[batch_row_[r]];
    count_.resize(T_);
    offset_.resize(T_);
    N_ = 0;
    int64_t n = B_;
    for (int64_t t = 0; t < T_; ++t) {
      while (n > 0 && length_[n - 1] <= t) --n;
      count_[t] = n;
      offset_[t] = N_;
      N_ += n;
    }
  }

  std::vector<uint8_t> fresh_steps(const at::Tensor& mask, bool reverse) const {
    const bool* given = mask.const_data_ptr<bool>();
    const Rows rows = this->rows(0);
    std::vector<uint8_t> fresh(N_ + 1);
    for (int64_t t = 0; t < T_; ++t)
      for (int64_t r = 0; r < rows.count_at(t); ++r) {
        const int64_t begins =
            reverse ? t + 1 : t;  // reverse: step t-1 starts from zero where step t begins a sequence
        fresh[rows.offset_at(t) + r] =
            begins < T_ && r < rows.count_at(begins) && given[begins * B_ + rows.batch_row_at(r)];
      }
    return fresh;
  }

  int64_t T_, B_, N_;
  bool packed_;
  std::vector<int64_t> count_, offset_, batch_row_, length_;
  std::vector<uint8_t> fresh_[2];
};

}  // namespace fastlstm
