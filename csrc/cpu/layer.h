// A layer on CPU tensors of one floating-point type: what its forward and backward share.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <functional>
#include <vector>

#include "contract.h"
#include "cpu/memory.h"
#include "cpu/ragged.h"
#include "cpu/sequence.h"
#include "cpu/team.h"

namespace fastlstm {

// The contract's ops for float and double (cpu/layer_forward.cpp, cpu/layer_backward.cpp).
template <class T>
LayerResults forward(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                     at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                     bool keep_cells, bool keep_reserve);
template <class T>
LayerGradients backward(const OptionalTensor& dy_in, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                        const OptionalTensor& dcells_in, const at::Tensor& x, const OptionalTensor& h0_in,
                        const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& lengths,
                        const OptionalTensor& reset_mask, const at::Tensor& y_in, const at::Tensor& cells_in,
                        const at::Tensor& reserve_in, const c10::List<bool>& needs);

// The same for bfloat16 on the kernels of cpu/bf16.h, which serve layers without projection where the CPU has
// them (cpu/layer_bf16.cpp).
bool bf16_serves(const LayerSizes& s, at::ScalarType dtype);
LayerForward forward_bf16;
LayerBackward backward_bf16;

// Where each direction's part lies in a Workspace.
using PerDirection = std::array<int64_t, 2>;

// One allocation cut into parts aligned to 64 bytes: take() what is needed, then allocate(), then resolve
// with at().
template <class T>
class Workspace {
 public:
  int64_t take(int64_t elements) {
    const int64_t offset = total_;
    constexpr int64_t kLine = 64 / sizeof(T);
    total_ += (elements + kLine - 1) / kLine * kLine;
    return offset;
  }
  void allocate(const at::Tensor& like) {
    buffer_ = new_workspace(total_, like);
    data_ = buffer_.mutable_data_ptr<T>();
  }
  T* at(int64_t offset) const { return data_ + offset; }

 private:
  int64_t total_ = 0;
  at::Tensor buffer_;
  T* data_ = nullptr;
};

// Up to so many rows of all steps, forward reads weights as they are stored: packing takes what 3 to 5 rows
// save by it.
constexpr int64_t kDirectRows = 4;
// Whether backward packs W_hh, a copy, for steps of up to B rows, N of all steps, of which a thread reads so
// many bytes in each: from an L2 it reads them about as fast where they are stored, a column's elements a row
// apart, but not from what lies behind.
inline bool packs_backward(int64_t N, int64_t B, int64_t bytes) {
  return N > (B > 2 ? 12 : bytes < l2_bytes() ? 64 : 8);
}

// Calls f(begin, end) over [0, n) in parallel, in multiples of `block` of which each takes `work` elements.
template <class F>
void for_blocks(int64_t n, int64_t block, int64_t work, F&& f) {
  at::parallel_for(0, (n + block - 1) / block, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work)),
                   [&](int64_t begin, int64_t end) { f(begin * block, std::min(n, end * block)); });
}

// B [K, N] of any strides into panels of columns.
template <class T>
void pack_columns(const at::Tensor& b, T* packed) {
  const Kernels<T>& k = kernels<T>();
  const int64_t K = b.size(0);
  for_blocks(b.size(1), k.unit_block, K * k.unit_block, [&](int64_t begin, int64_t end) {
    k.pack_columns(b.const_data_ptr<T>(), K, b.stride(0), b.stride(1), begin, end, packed);
  });
}

// state [D, B, n] of direction d into sorted rows of stride ld; zeros for none.
template <class T>
void gather_state(const OptionalTensor& state, int64_t d, const Rows& rows, int64_t n, T* out, int64_t ld) {
  const T* in = state ? state->const_data_ptr<T>() + d * rows.B * n : nullptr;
  for (int64_t r = 0; r < rows.B; ++r) {
    if (in)
      std::copy_n(in + rows.batch_row_at(r) * n, n, out + r * ld);
    else
      std::fill_n(out + r * ld, n, T(0));
  }
}

// bias_ih + bias_hh [4H], zeros without.
template <class T>
void sum_biases(const at::Tensor& bias_ih, const at::Tensor& bias_hh, int64_t H, T* out) {
  if (!bias_ih.defined()) {
    std::fill_n(out, 4 * H, T(0));
    return;
  }
  const at::Tensor ih = bias_ih.contiguous(), hh = bias_hh.contiguous();
  std::transform(ih.const_data_ptr<T>(), ih.const_data_ptr<T>() + 4 * H, hh.const_data_ptr<T>(), out,
                 std::plus<T>());
}

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// x as its N packed rows, one after the other; the padding is never read.
template <class T>
at::Tensor packed_input(const at::Tensor& x, const LayerSizes& s, const Ragged& ragged) {
  const at::Tensor rows = x.contiguous();
  if (!ragged.padded()) return rows;
  at::Tensor packed = new_empty({ragged.N(), s.I}, x);
  const T* from = rows.const_data_ptr<T>();
  T* to = packed.mutable_data_ptr<T>();
  ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
    std::copy_n(from + row * s.I, s.I, to + packed_row * s.I);
  });
  return packed;
}

}  // namespace fastlstm
