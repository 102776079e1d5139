// The Engine of the kernels of cpu/bf16.h, on AMX or AVX512_BF16: layers of T = Bf16, or of float, of which
// only the factors of products are rounded.
#pragma once

#include "cpu/bf16_product.h"
#include "cpu/engine.h"

namespace fastlstm {

// Zeros in columns [n, padded(n)) of a left operand, which tiles read.
inline void clear_padding(int threads, Bf16* factor, int64_t rows, int64_t n) {
  const int64_t stride = bf16::row_stride(n), padding = bf16::padded(n) - n;
  if (padding > 0)
    for_blocks(threads, rows, 1, padding, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) std::fill_n(factor + r * stride + n, padding, Bf16(0));
    });
}

template <class T>
class Bf16Forward {
  static constexpr bool kIsFloat = std::is_same_v<T, float>;

 public:
  Bf16Forward(const LayerInputs& in, const LayerSizes& s, const Ragged&, const ForwardPlan& plan,
              const PackedView* packed)
      : s_(s), plan_(plan), packed_(packed), x_(in.x.contiguous()) {}

  // Where T is Bf16, the state is the factor that tiles read.
  static int64_t state_stride(int64_t P) { return kIsFloat ? P : bf16::row_stride(P); }
  static int64_t state_rows(int64_t B) { return kIsFloat ? B : bf16::factor_rows(B); }

  void reserve(Workspace& space) {
    for (int64_t d = 0; !packed_ && d < s_.D; ++d) {
      ih_offset_[d] = space.take<Bf16>(bf16::packed_gates_size(s_.H, s_.I));
      hh_offset_[d] = space.take<Bf16>(bf16::packed_gates_size(s_.H, s_.P));
      hr_offset_[d] = space.take<Bf16>(s_.proj() ? bf16::packed_columns_size(s_.H, s_.P) : 0);
    }
    for (int64_t d = 0; s_.proj() && d < s_.D; ++d)
      hidden_offset_[d] = space.take<Bf16>(bf16::factor_rows(s_.B) * bf16::row_stride(s_.H));
    for (int64_t d = 0; kIsFloat && d < s_.D; ++d) factor_offset_[d] = space.take<Bf16>(2 * factor_slot());
    scratch_offset_ = space.take<Bf16>(plan_.partition.threads() * bf16::forward_scratch(s_.I));
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights& w, const ForwardBuffers<T, T>& b) {
    Bf16 *ih, *hh, *hr = nullptr, *hidden = nullptr;
    if (packed_) {
      ih = packed_->weight<Bf16>(PackedWeight::ih, d), hh = packed_->weight<Bf16>(PackedWeight::hh, d);
      if (s_.proj()) hr = packed_->weight<Bf16>(PackedWeight::hr, d);
    } else {
      ih = space.at<Bf16>(ih_offset_[d]), hh = space.at<Bf16>(hh_offset_[d]);
      pack_gates(w.ih.contiguous(), ih);
      pack_gates(w.hh.contiguous(), hh);
      if (s_.proj()) pack_rows(w.hr.contiguous(), hr = space.at<Bf16>(hr_offset_[d]));
    }
    if (s_.proj()) {
      hidden = space.at<Bf16>(hidden_offset_[d]);
      clear_padding(plan_.partition.threads(), hidden, bf16::factor_rows(s_.B), s_.H);
    }
    Bf16* factors;
    if constexpr (kIsFloat)
      round_state(b.h, factors = space.at<Bf16>(factor_offset_[d]));
    else
      factors = b.h;
    args_[d] = {b.rows,
                s_.I,
                s_.H,
                s_.P,
                b.reverse,
                data_of<T>(x_),
                b.bias,
                ih,
                hh,
                hr,
                b.gates,
                factors,
                kIsFloat ? b.h : nullptr,
                hidden,
                b.c,
                b.y,
                b.cells,
                b.y_stride,
                b.cells_stride,
                space.at<Bf16>(scratch_offset_),
                b.masks,
                b.h0};
  }

  void run(int64_t d, const Member& me) const { kernel_.forward(args_[d], me); }

 private:
  void pack_gates(const at::Tensor& weight, Bf16* packed) const {
    const int64_t K = weight.size(1);
    for_blocks(plan_.partition.threads(), s_.H, bf16::kBlock, K * bf16::kBlock,
               [&](int64_t begin, int64_t end) {
                 kernel_.pack_gates(data_of<T>(weight), s_.H, K, begin, end, packed);
               });
  }
  void pack_rows(const at::Tensor& weight, Bf16* packed) const {
    const int64_t N = weight.size(0), K = weight.size(1);
    for_blocks(plan_.partition.threads(), N, bf16::kUnits, K * bf16::kUnits, [&](int64_t begin, int64_t end) {
      kernel_.pack_rows(data_of<T>(weight), N, K, begin, end, packed);
    });
  }
  int64_t factor_slot() const { return bf16::factor_rows(s_.B) * bf16::row_stride(s_.P); }
  // The state [B, P] that enters the first step into both slots of factors, whose padding is zero.
  void round_state(const float* h, Bf16* factors) const {
    std::fill_n(factors, factor_slot(), Bf16(0));
    for (int64_t r = 0; r < s_.B; ++r) copy_numbers(h + r * s_.P, s_.P, factors + r * bf16::row_stride(s_.P));
    std::copy_n(factors, factor_slot(), factors + factor_slot());
  }

  const bf16::Kernels<T>& kernel_ = *bf16::kernels<T>();
  const LayerSizes& s_;
  const ForwardPlan& plan_;
  const PackedView* packed_;
  const at::Tensor x_;  // the caller's rows
  PerDirection ih_offset_, hh_offset_, hr_offset_, hidden_offset_, factor_offset_;
  int64_t scratch_offset_ = 0;
  bf16::ForwardArgs<T> args_[2];
};

template <class T>
class Bf16Backward {
  static constexpr bool kIsFloat = std::is_same_v<T, float>;

 public:
  // need_hr[d]: true if dW_hr of direction d is needed.
  Bf16Backward(const LayerInputs& in, const LayerSizes& s, const BackwardPlan& plan, bool need_dx,
               const bool (&need_hr)[2])
      : s_(s), plan_(plan), need_hr_{need_hr[0], need_hr[1]} {
    for (int64_t d = 0; need_dx && d < s.D; ++d) w_ih_[d] = in.weights[d * s.per_direction].contiguous();
  }

  static int64_t gradient_stride(int64_t P) { return bf16::padded(P); }

  void reserve(Workspace& space) {
    for (int64_t d = 0; d < s_.D; ++d) {
      packed_offset_[d] = space.take<Bf16>(bf16::packed_columns_size(G_, s_.P));
      if (packs_ih(d)) packed_ih_offset_[d] = space.take<Bf16>(bf16::packed_columns_size(G_, s_.I));
      db_offset_[d] = space.take<float>(plan_.partition.threads() * G_);
      if (!s_.proj()) continue;
      packed_hr_offset_[d] = space.take<Bf16>(bf16::packed_columns_size(s_.P, s_.H));
      dr_offset_[d] = space.take<Bf16>(chunk_rows() * bf16::row_stride(s_.P));
      hidden_offset_[d] = space.take<Bf16>(need_hr_[d] ? plan_.chunk_steps * s_.B * s_.H : 0);
      dhidden_offset_[d] = space.take<float>(s_.B * bf16::padded(s_.H));
    }
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights& w, const BackwardBuffers<T>& b) {
    const at::Tensor w_hh = w.hh.contiguous();
    Bf16* packed = space.at<Bf16>(packed_offset_[d]);
    // A block of its own, which is cached between calls up to a limit per block.
    dgates_[d] = new_workspace(chunk_rows() * stride_ * static_cast<int64_t>(sizeof(Bf16)));
    Bf16* dgates = reinterpret_cast<Bf16*>(dgates_[d].mutable_data_ptr<uint8_t>());
    const int threads = plan_.partition.threads();
    pack_bf16_columns(threads, data_of<T>(w_hh), G_, s_.P, s_.P, packed);
    if (packs_ih(d)) {
      packed_ih_[d] = space.at<Bf16>(packed_ih_offset_[d]);
      pack_bf16_columns(threads, data_of<T>(w_ih_[d]), G_, s_.I, s_.I, packed_ih_[d]);
    }
    clear_padding(threads, dgates, chunk_rows(), G_);
    Bf16 *packed_hr = nullptr, *dr = nullptr;
    if (s_.proj()) {
      const at::Tensor w_hr = w.hr.contiguous();
      packed_hr = space.at<Bf16>(packed_hr_offset_[d]), dr = space.at<Bf16>(dr_offset_[d]);
      pack_bf16_columns(threads, data_of<T>(w_hr), s_.P, s_.H, s_.H, packed_hr);
      clear_padding(threads, dr, chunk_rows(), s_.P);
    }
    float* db = space.at<float>(db_offset_[d]);
    std::fill_n(db, threads * G_, 0.0f);
    args_[d] = {b.rows,
                s_.H,
                s_.P,
                b.reverse,
                0,
                0,
                0,
                b.gates,
                b.cells,
                b.c0,
                b.dy,
                b.dcells,
                b.cells_stride,
                b.dy_stride,
                b.dcells_stride,
                packed,
                packed_hr,
                dgates,
                dr,
                need_hr_[d] ? space.at<Bf16>(hidden_offset_[d]) : nullptr,
                b.dh,
                s_.proj() ? space.at<float>(dhidden_offset_[d]) : nullptr,
                b.dc,
                db,
                b.masks,
                b.kept_h};
  }

  void select_steps(int64_t d, const Span& span, T*) {
    args_[d].first = span.first, args_[d].steps = span.steps, args_[d].base = span.begin;
  }

  void run(int64_t d, const Member& me) { kernel_.backward(args_[d], me); }

  MatrixView<Bf16> dgates(int64_t d) const { return {args_[d].dgates, stride_}; }
  MatrixView<Bf16> dhh(int64_t d) const { return dgates(d); }
  void norm_gradient(int64_t, int64_t, float*) const {}  // the float kernels run layer normalization
  MatrixView<Bf16> dr(int64_t d) const { return {args_[d].dr, bf16::row_stride(s_.P)}; }
  MatrixView<Bf16> hidden(int64_t d) const { return {args_[d].hidden, s_.H}; }

  void input_gradient(int64_t d, int64_t n, T* dx) const {
    if constexpr (kIsFloat) {
      multiply_bf16({n, s_.I, G_, args_[d].dgates, stride_, /*transposed_a=*/false, packed_ih_[d], s_.D == 2,
                     dx, s_.I, nullptr});
    } else {
      at::Tensor out = matrix_tensor(dx, n, s_.I, s_.I, 1);
      const at::Tensor dgates = matrix_tensor(args_[d].dgates, n, G_, stride_, 1);
      if (s_.D == 2)
        at::addmm_out(out, out, dgates, w_ih_[d]);
      else
        at::mm_out(out, dgates, w_ih_[d]);
    }
  }

  void bias_gradient(int64_t, int64_t, bool, float*) const {}  // the kernels sum over each thread's rows
  void finish_bias(int64_t d, float* db) const {
    for (int64_t j = 0; j < G_; ++j) {
      db[j] = 0;
      for (int m = 0; m < plan_.partition.threads(); ++m) db[j] += args_[d].db[m * G_ + j];
    }
  }

 private:
  int64_t chunk_rows() const { return bf16::factor_rows(plan_.chunk_steps * s_.B); }
  bool packs_ih(int64_t d) const { return kIsFloat && w_ih_[d].defined(); }

  const bf16::Kernels<T>& kernel_ = *bf16::kernels<T>();
  const LayerSizes& s_;
  const BackwardPlan& plan_;
  const bool need_hr_[2];
  const int64_t G_ = 4 * s_.H, stride_ = bf16::row_stride(G_);
  PerDirection packed_offset_, packed_ih_offset_, packed_hr_offset_, db_offset_, dr_offset_, hidden_offset_,
      dhidden_offset_;
  Bf16* packed_ih_[2] = {nullptr, nullptr};  // pack_columns of weight_ih, where T is float and dx is needed
  at::Tensor w_ih_[2], dgates_[2];
  bf16::BackwardArgs<T> args_[2];
};

// A weight's gradient: a product for each chunk and, with h0, for its rows, summed in float32.
template <class T>
class Bf16WeightGradient;

template <>
class Bf16WeightGradient<Bf16> {
 public:
  Bf16WeightGradient(const at::Tensor& dw, const WgradPlan& plan) : dw_(dw), at_once_(plan.at_once) {}

  void add(int64_t rows, MatrixView<Bf16> dgates, MatrixView<Bf16> states, bool /*accumulate*/) {
    const int64_t m = dw_.size(0), n = dw_.size(1);
    const at::Tensor left = matrix_tensor(dgates.data, m, rows, 1, dgates.stride),
                     right = matrix_tensor(states.data, rows, n, states.stride, 1);
    if (at_once_) {
      at::mm_out(dw_, left, right);
    } else if (sum_.defined()) {
      sum_.add_(at::mm(left, right));
    } else {
      sum_ = at::mm(left, right).to(at::kFloat);
    }
  }
  void finish() {
    if (sum_.defined()) dw_.copy_(sum_);
  }

 private:
  at::Tensor dw_, sum_;
  bool at_once_;
};

template <>
class Bf16WeightGradient<float> {
 public:
  Bf16WeightGradient(const at::Tensor& dw, const WgradPlan&) : dw_(dw) {}

  void add(int64_t rows, MatrixView<Bf16> dgates, MatrixView<Bf16> states, bool accumulate) {
    const int64_t m = dw_.size(0), n = dw_.size(1);
    const at::Tensor buffer = new_workspace(bf16::packed_columns_size(rows, n) * sizeof(Bf16));
    Bf16* packed = reinterpret_cast<Bf16*>(buffer.mutable_data_ptr<uint8_t>());
    pack_bf16_columns(at::get_num_threads(), states.data, rows, n, states.stride, packed);
    multiply_bf16({m, n, rows, dgates.data, dgates.stride, /*transposed_a=*/true, packed, accumulate,
                   dw_.mutable_data_ptr<float>(), n, nullptr});
  }
  void finish() {}

 private:
  at::Tensor dw_;
};

template <class T>
struct Bf16Engine {
  using Number = T;
  using State = T;
  using Operand = Bf16;
  using InputGradient = T;
  using Forward = Bf16Forward<T>;
  using Backward = Bf16Backward<T>;
  using WeightGradient = Bf16WeightGradient<T>;

  static int64_t unit_block() { return bf16::kUnits; }
  static at::Tensor operands(const at::Tensor& t) {
    if constexpr (std::is_same_v<T, Bf16>) return t;
    return from_real<Bf16>(t);
  }
  static at::Tensor input_gradient_like(const at::Tensor& x) { return x; }
};

}  // namespace fastlstm
