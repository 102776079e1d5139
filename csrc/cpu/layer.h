// A layer on CPU tensors of one floating-point type: what its forward and backward share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <vector>

#include "contract.h"
#include "cpu/memory.h"
#include "cpu/packed.h"
#include "cpu/ragged.h"
#include "cpu/run_partition.h"
#include "cpu/sequence.h"

namespace fastlstm {

// The contract's ops for tensors of T = float, double or Bf16 (cpu/layer_forward.cpp,
// cpu/layer_backward.cpp).
// bf16_requested: LayerShape's.
template <class T>
LayerResults forward(const LayerInputs& in, bool keep_cells, bool keep_reserve, bool bf16_requested);
// Tensors that a layer writes its results into, contiguous and of the results' sizes; new ones where
// undefined. h_n may be h0 and c_n may be c0, because states are read before results are written; no other
// overlap, but y may be h_n if D = 1 and T = 1.
struct GivenResults {
  at::Tensor y, h_n, c_n;
};
// The same with weights packed before the call; without a reserve. cells is undefined unless kept. given:
// without lengths, since rows past a length would keep what is there.
template <class T>
LayerResults forward_frozen(const LayerInputs& in, const PackedView& packed, bool keep_cells,
                            const GivenResults& given);
template <class T>
LayerGradients backward(const ResultGradients& grads, const LayerInputs& in, const SavedResults& saved,
                        const c10::List<bool>& needs, bool bf16_requested);

// What plans are made from, for a layer of numbers stored as T.
template <class T>
LayerShape layer_shape(const LayerSizes& s, const Ragged& ragged, const OptionalTensor& h0,
                       bool bf16_requested = false) {
  const Dtype dtype = std::is_same_v<T, double> ? Dtype::float64
                      : std::is_same_v<T, Bf16> ? Dtype::bfloat16
                                                : Dtype::float32;
  return {dtype,
          s.T,
          s.B,
          ragged.N(),
          s.rows(),
          mean_active_rows(ragged.rows(0)),
          s.I,
          s.H,
          s.P,
          s.D,
          h0 && ragged.plain(),
          Frozen::no,
          s.norm,
          bf16_requested};
}

template <class T>
using Stored = std::conditional_t<std::is_same_v<T, Bf16>, at::BFloat16, T>;

template <class T>
const T* data_of(const at::Tensor& t) {
  return reinterpret_cast<const T*>(t.const_data_ptr<Stored<T>>());
}
template <class T>
T* writable(const at::Tensor& t) {
  return reinterpret_cast<T*>(t.mutable_data_ptr<Stored<T>>());
}
// The units of a block of the saved gates (cpu/sequence.h): a vector of Real<T>, whichever Engine wrote them,
// since torch's flag may change between forward and backward (cpu/bf16_numbers.h asserts it).
template <class T>
int64_t saved_block() {
  return kernels<Real<T>>().width;
}
// n numbers stored as From into numbers stored as To.
template <class From, class To>
void copy_numbers(const From* from, int64_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::copy_n(from, n, to);
  } else {
    static_assert(std::is_same_v<From, Bf16> != std::is_same_v<To, Bf16>);
    if constexpr (std::is_same_v<To, Bf16>)
      kernels<Bf16>().round(from, n, to);
    else
      for (int64_t k = 0; k < n; ++k) to[k] = c10::detail::f32_from_bits(from[k]);
  }
}
// What buffers of sums and states are of where x is stored as T.
template <class T>
at::Tensor real_like(const at::Tensor& x) {
  if constexpr (!std::is_same_v<T, Bf16>) return x;
  static const at::Tensor empty = at::empty({0}, at::kFloat);
  return empty;
}
template <class T>
at::Tensor to_real(const at::Tensor& t) {
  if constexpr (!std::is_same_v<T, Bf16>) return t;
  if (t.numel() > kInlineConvertMaxElements || !t.is_contiguous()) return t.to(at::kFloat);
  const at::Tensor out = new_empty(t.sizes(), real_like<T>(t));  // sooner than the dispatcher
  copy_numbers(data_of<Bf16>(t), t.numel(), out.mutable_data_ptr<float>());
  return out;
}

template <class T>
at::Tensor from_real(const at::Tensor& t) {
  if constexpr (!std::is_same_v<T, Bf16>) return t;
  if (t.numel() > kInlineConvertMaxElements) return t.to(at::kBFloat16);
  static const at::Tensor like = at::empty({0}, at::kBFloat16);
  const at::Tensor out = new_empty(t.sizes(), like);
  copy_numbers(t.const_data_ptr<float>(), t.numel(), writable<Bf16>(out));
  return out;
}

// Where each direction's part lies in a Workspace.
using PerDirection = std::array<int64_t, 2>;

// One allocation cut into parts aligned to 64 bytes: take() what is needed, then allocate(), then resolve
// with at().
class Workspace {
 public:
  // The offset of n elements.
  template <class T>
  int64_t take(int64_t n) {
    constexpr int64_t kLine = 64;
    const int64_t offset = bytes_;
    bytes_ += (n * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine * kLine;
    return offset;
  }
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (thread_block_) thread_block_->in_use = false;
  }
  void allocate() {
    thread_block_ = bytes_ <= kThreadWorkspaceMaxBytes ? take_thread_block(bytes_) : nullptr;
    if (!thread_block_) buffer_ = new_workspace(bytes_);
    data_ = thread_block_ ? thread_block_->data() : buffer_.mutable_data_ptr<uint8_t>();
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(data_ + offset);
  }

 private:
  int64_t bytes_ = 0;
  ThreadBlock* thread_block_ = nullptr;
  at::Tensor buffer_;
  uint8_t* data_ = nullptr;
};

// Calls f(begin, end) over [0, n) on up to this many threads, in multiples of `block` of which each takes
// `work` elements.
template <class F>
void for_blocks(int threads, int64_t n, int64_t block, int64_t work, F&& f) {
  const int64_t blocks = (n + block - 1) / block;
  const int64_t grain =
      std::max(kPackTaskMinElements / std::max<int64_t>(1, work), (blocks + threads - 1) / threads);
  at::parallel_for(0, blocks, std::max<int64_t>(1, grain),
                   [&](int64_t begin, int64_t end) { f(begin * block, std::min(n, end * block)); });
}

// B [K, N] of any strides into panels of columns.
template <class T, class S>
void pack_columns(int threads, const at::Tensor& b, S* packed) {
  const Kernels<T, S>& k = kernels<T, S>();
  const int64_t K = b.size(0);
  for_blocks(threads, b.size(1), k.unit_block, K * k.unit_block, [&](int64_t begin, int64_t end) {
    k.pack_columns(data_of<T>(b), K, b.stride(0), b.stride(1), begin, end, packed);
  });
}

// state [D, B, n] of direction d into sorted rows of stride ld, the rest of a row untouched; zeros for none.
template <class T, class Out>
void gather_state(const OptionalTensor& state, int64_t d, const Rows& rows, int64_t n, Out* out, int64_t ld) {
  const T* in = state ? data_of<T>(*state) + d * rows.B * n : nullptr;
  for (int64_t r = 0; r < rows.B; ++r) {
    if (in)
      copy_numbers(in + rows.batch_row_at(r) * n, n, out + r * ld);
    else
      std::fill_n(out + r * ld, n, Out(0));
  }
}
// Masks h [n] as it enters step t of the caller's row b. mask: of numbers.
template <class R, class H>
void mask_state(const RowMask<R>& mask, int64_t t, int64_t b, int64_t n, H* h) {
  const R* factors = mask.numbers + t * mask.step_stride + b * mask.row_stride;
  for (int64_t k = 0; k < n; ++k) h[k] = H(h[k] * factors[k]);
}
// The reverse of gather_state: sorted rows of stride ld into direction d of state [D, B, n].
template <class T, class In>
void scatter_state(const In* in, int64_t ld, int64_t d, const Rows& rows, int64_t n,
                   const at::Tensor& state) {
  T* out = writable<T>(state) + d * rows.B * n;
  for (int64_t r = 0; r < rows.B; ++r) copy_numbers(in + r * ld, n, out + rows.batch_row_at(r) * n);
}

// out[k] += t[k]
template <class T>
void add_numbers(const at::Tensor& t, Real<T>* out) {
  const at::Tensor numbers = t.contiguous();
  const Stored<T>* from = numbers.const_data_ptr<Stored<T>>();
  for (int64_t k = 0; k < numbers.numel(); ++k) out[k] += Real<T>(from[k]);
}
// bias_ih + bias_hh [4H], zeros without.
template <class T>
void sum_biases(const at::Tensor& bias_ih, const at::Tensor& bias_hh, int64_t H, Real<T>* out) {
  if (!bias_ih.defined()) {
    std::fill_n(out, 4 * H, Real<T>(0));
    return;
  }
  const at::Tensor ih = bias_ih.contiguous();
  copy_numbers(data_of<T>(ih), 4 * H, out);
  add_numbers<T>(bias_hh, out);
}

// A direction's weights of layer normalization as numbers.
template <class T>
class LayerNorm {
 public:
  LayerNorm() = default;
  explicit LayerNorm(const DirectionWeights& w) {
    for (int64_t k = 0; k < kNormWeights; ++k) values_[k] = to_real<T>(w.norm[k].contiguous());
  }
  NormWeights<Real<T>> weights() const { return {data(0), data(2), data(4), data(5)}; }

 private:
  const Real<T>* data(int64_t k) const { return values_[k].template const_data_ptr<Real<T>>(); }
  std::array<at::Tensor, kNormWeights> values_;
};

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
