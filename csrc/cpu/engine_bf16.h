// The Engine of the kernels of cpu/bf16.h: bfloat16 layers without projection on AMX or AVX512_BF16.
#pragma once

#include "cpu/bf16.h"
#include "cpu/engine.h"

namespace fastlstm {

class Bf16Forward {
 public:
  Bf16Forward(const LayerInputs& in, const LayerSizes& s, const Ragged&, const ForwardPlan& plan,
              const PackedView* packed)
      : s_(s), plan_(plan), packed_(packed), x_(in.x.contiguous()) {}

  static int64_t state_stride(int64_t H) { return bf16::row_stride(H); }
  static int64_t state_rows(int64_t B) { return B + bf16::kTileRows; }

  void reserve(Workspace& space) {
    for (int64_t d = 0; !packed_ && d < s_.D; ++d) {
      ih_offset_[d] = space.take<Bf16>(bf16::packed_gates_size(s_.H, s_.I));
      hh_offset_[d] = space.take<Bf16>(bf16::packed_gates_size(s_.H, s_.H));
    }
    scratch_offset_ = space.take<Bf16>(plan_.partition.threads() * bf16::forward_scratch(s_.I));
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights& w,
               const ForwardBuffers<Bf16, Bf16>& b) {
    Bf16 *ih, *hh;
    if (packed_) {
      ih = packed_->weight<Bf16>(PackedWeight::ih, d), hh = packed_->weight<Bf16>(PackedWeight::hh, d);
    } else {
      ih = space.at<Bf16>(ih_offset_[d]), hh = space.at<Bf16>(hh_offset_[d]);
      pack_gates(w.ih.contiguous(), ih);
      pack_gates(w.hh.contiguous(), hh);
    }
    args_[d] = {b.rows,
                s_.I,
                s_.H,
                b.reverse,
                data_of<Bf16>(x_),
                b.bias,
                ih,
                hh,
                b.gates,
                b.h,
                b.c,
                b.y,
                b.cells,
                b.y_stride,
                b.cells_stride,
                space.at<Bf16>(scratch_offset_)};
  }

  void run(int64_t d, const Member& me) const { kernel_.forward(args_[d], me); }

 private:
  void pack_gates(const at::Tensor& weight, Bf16* packed) const {
    const int64_t K = weight.size(1);
    for_blocks(plan_.partition.threads(), s_.H, bf16::kBlock, K * bf16::kBlock,
               [&](int64_t begin, int64_t end) {
                 kernel_.pack_gates(data_of<Bf16>(weight), s_.H, K, begin, end, packed);
               });
  }

  const bf16::Kernels& kernel_ = *bf16::kernels();
  const LayerSizes& s_;
  const ForwardPlan& plan_;
  const PackedView* packed_;
  const at::Tensor x_;  // the caller's rows
  PerDirection ih_offset_, hh_offset_;
  int64_t scratch_offset_ = 0;
  bf16::ForwardArgs args_[2];
};

class Bf16Backward {
 public:
  Bf16Backward(const LayerInputs& in, const LayerSizes& s, const BackwardPlan& plan, bool need_dx,
               const bool (&)[2])
      : s_(s), plan_(plan) {
    for (int64_t d = 0; need_dx && d < s.D; ++d) w_ih_[d] = in.weights[d * s.per_direction];
  }

  static int64_t gradient_stride(int64_t H) { return bf16::padded(H); }

  void reserve(Workspace& space) {
    for (int64_t d = 0; d < s_.D; ++d) {
      packed_offset_[d] = space.take<Bf16>(bf16::packed_columns_size(G_, s_.H));
      db_offset_[d] = space.take<float>(plan_.partition.threads() * G_);
    }
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights& w, const BackwardBuffers<Bf16>& b) {
    const at::Tensor w_hh = w.hh.contiguous();
    Bf16* packed = space.at<Bf16>(packed_offset_[d]);
    // A block of its own, which is cached between calls up to a limit per block.
    dgates_[d] = new_workspace(dgates_rows() * stride_ * static_cast<int64_t>(sizeof(Bf16)));
    Bf16* dgates = reinterpret_cast<Bf16*>(dgates_[d].mutable_data_ptr<uint8_t>());
    for_blocks(plan_.partition.threads(), s_.H, bf16::kUnits, G_ * bf16::kUnits,
               [&](int64_t begin, int64_t end) {
                 kernel_.pack_columns(data_of<Bf16>(w_hh), G_, s_.H, begin, end, packed);
               });
    const int64_t padding = bf16::padded(G_) - G_;  // which tiles read
    if (padding > 0)
      for_blocks(plan_.partition.threads(), dgates_rows(), 1, padding, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) std::fill_n(dgates + r * stride_ + G_, padding, Bf16(0));
      });
    float* db = space.at<float>(db_offset_[d]);
    std::fill_n(db, plan_.partition.threads() * G_, 0.0f);
    args_[d] = {b.rows,      s_.H,
                b.reverse,   0,
                0,           0,
                b.gates,     b.cells,
                b.c0,        b.dy,
                b.dcells,    b.cells_stride,
                b.dy_stride, b.dcells_stride,
                packed,      dgates,
                b.dh,        b.dc,
                db};
  }

  void select_steps(int64_t d, const Span& span, Bf16*) {
    args_[d].first = span.first, args_[d].steps = span.steps, args_[d].base = span.begin;
  }

  void run(int64_t d, const Member& me) { kernel_.backward(args_[d], me); }

  MatrixView<Bf16> dgates(int64_t d) const { return {args_[d].dgates, stride_}; }
  MatrixView<Bf16> dhh(int64_t d) const { return dgates(d); }
  void norm_gradient(int64_t, int64_t, float*) const {}  // the float kernels run layer normalization
  const Bf16* dr(int64_t) const { return nullptr; }      // no projection
  const Bf16* hidden(int64_t) const { return nullptr; }

  void input_gradient(int64_t d, int64_t n, Bf16* dx) const {
    at::Tensor out = matrix_tensor(dx, n, s_.I, s_.I, 1);
    const at::Tensor dgates = matrix_tensor(args_[d].dgates, n, G_, stride_, 1);
    if (s_.D == 2)
      at::addmm_out(out, out, dgates, w_ih_[d]);
    else
      at::mm_out(out, dgates, w_ih_[d]);
  }

  void bias_gradient(int64_t, int64_t, bool, float*) const {}  // the kernels sum over each thread's rows
  void finish_bias(int64_t d, float* db) const {
    for (int64_t j = 0; j < G_; ++j) {
      db[j] = 0;
      for (int m = 0; m < plan_.partition.threads(); ++m) db[j] += args_[d].db[m * G_ + j];
    }
  }

 private:
  int64_t dgates_rows() const { return plan_.chunk_steps * s_.B + bf16::kTileRows; }

  const bf16::Kernels& kernel_ = *bf16::kernels();
  const LayerSizes& s_;
  const BackwardPlan& plan_;
  const int64_t G_ = 4 * s_.H, stride_ = bf16::row_stride(G_);
  PerDirection packed_offset_, db_offset_;
  at::Tensor w_ih_[2], dgates_[2];
  bf16::BackwardArgs args_[2];
};

// A weight's gradient: a product for each chunk and, with h0, for its rows, summed in float32.
class Bf16WeightGradient {
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

struct Bf16Engine {
  using Number = Bf16;
  using State = Bf16;
  using Operand = Bf16;
  using Forward = Bf16Forward;
  using Backward = Bf16Backward;
  using WeightGradient = Bf16WeightGradient;

  static int64_t unit_block() { return bf16::kUnits; }
  static int64_t saved_block() { return bf16::kBlock; }
  static at::Tensor operands(const at::Tensor& t) { return t; }
  static at::Tensor operand_like(const at::Tensor& x) { return x; }
};

}  // namespace fastlstm
