// The Engine of the kernels of cpu/forward.h and cpu/backward.h: numbers stored as T = float, double or Bf16,
// arithmetic in Real<T>, panels of S.
#pragma once

#include "cell.h"
#include "cpu/engine.h"
#include "cpu/weight_gradient.h"

namespace fastlstm {

template <class T, class S>
class FloatForward {
  using R = Real<T>;

 public:
  FloatForward(const LayerInputs& in, const LayerSizes& s, const Ragged& ragged, const ForwardPlan& plan,
               const PackedView* packed)
      : s_(s),
        plan_(plan),
        packed_(packed),
        N_(ragged.N()),
        x_(to_real<T>(packed_input<Stored<T>>(in.x, s, ragged))),
        ih_size_(pack_ih() ? packed_size(s.I) : 0),
        hh_size_(pack_hh() ? packed_size(s.P) : 0) {}

  static int64_t state_stride(int64_t P) { return P; }
  static int64_t state_rows(int64_t B) { return B; }

  void reserve(Workspace& space) {
    for (int64_t d = 0; d < s_.D; ++d) {
      ih_offset_[d] = space.take<S>(plan_.partition.copies * ih_size_);
      hh_offset_[d] = space.take<S>(plan_.partition.copies * hh_size_);
      hr_offset_[d] = space.take<S>(pack_hr() ? kernel_.columns_packed_size(s_.H, s_.P) : 0);
      hidden_offset_[d] = space.take<R>(s_.proj() ? s_.B * s_.H : 0);
    }
    const auto scratch = s_.norm ? kernel_.norm_forward_scratch : kernel_.forward_scratch;
    scratch_offset_ = space.take<R>(plan_.partition.threads() * scratch(N_, s_.I, s_.H, s_.P));
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights& w, const ForwardBuffers<T, R>& b) {
    const ThreadPartition& threads = plan_.partition;
    GateWeight<T, S> of_x{nullptr, nullptr, plan_.w_ih}, of_h{nullptr, nullptr, plan_.w_hh},
        of_hidden{nullptr, nullptr, plan_.w_hr};
    if (packed_) {
      of_x.packed = packed_->weight<S>(PackedWeight::ih, d);
      of_h.packed = packed_->weight<S>(PackedWeight::hh, d);
      if (s_.proj()) of_hidden.packed = packed_->weight<S>(PackedWeight::hr, d);
    } else {
      weights_[d] = {w.ih.contiguous(), w.hh.contiguous(), s_.proj() ? w.hr.contiguous() : at::Tensor()};
      const auto& [ih, hh, hr] = weights_[d];
      of_x.stored = data_of<T>(ih), of_h.stored = data_of<T>(hh);
      if (s_.proj()) of_hidden.stored = data_of<T>(hr);
    }
    if (pack_ih()) of_x.packed = space.at<S>(ih_offset_[d]);
    if (pack_hh()) of_h.packed = space.at<S>(hh_offset_[d]);
    if (pack_hr()) {
      of_hidden.packed = space.at<S>(hr_offset_[d]);
      pack_columns<T>(threads.threads(), w.hr.t(), of_hidden.packed);
    }
    args_[d] = {b.rows,
                s_.I,
                s_.H,
                s_.P,
                b.reverse,
                x_.template const_data_ptr<R>(),
                b.gates,
                b.bias,
                of_x,
                of_h,
                of_hidden,
                s_.proj() ? space.at<R>(hidden_offset_[d]) : nullptr,
                {b.h, b.h + s_.B * s_.P},
                b.c,
                b.c,
                b.y,
                b.cells,
                b.y_stride,
                b.cells_stride,
                space.at<R>(scratch_offset_),
                b.masks,
                b.h0};
    if (s_.norm) {
      norm_[d] = LayerNorm<T>(w);
      args_[d].norm = norm_[d].weights();
      if (b.gates) {
        args_[d].saved_ih = b.gates + s_.rows() * 4 * s_.H;
        args_[d].saved_hh = b.gates + s_.rows() * 8 * s_.H;
      }
    }
    if ((pack_ih() || pack_hh()) && !threads.private_weights())
      for_blocks(threads.threads(), s_.H, kernel_.width,
                 (pack_ih() * s_.I + pack_hh() * s_.P) * 4 * kernel_.width,
                 [&](int64_t begin, int64_t end) { pack(args_[d], begin, end); });
  }

  void run(int64_t d, const Member& me) const {
    const ThreadPartition& threads = plan_.partition;
    ForwardArgs<T, S> mine = args_[d];
    if (pack_ih()) mine.ih.packed += threads.copy(me.index) * ih_size_;
    if (pack_hh()) mine.hh.packed += threads.copy(me.index) * hh_size_;
    if (!packed_ && threads.private_weights()) pack(mine, me.unit_begin, me.unit_end);
    (s_.norm ? kernel_.norm_forward : kernel_.forward)(mine, me);
  }

 private:
  bool pack_ih() const { return !packed_ && plan_.w_ih == WeightMode::prepacked; }
  bool pack_hh() const { return !packed_ && plan_.w_hh == WeightMode::prepacked; }
  bool pack_hr() const { return !packed_ && s_.proj() && plan_.w_hr == WeightMode::prepacked; }
  // Of a weight [4H, K].
  int64_t packed_size(int64_t K) const {
    return s_.norm ? kernel_.columns_packed_size(K, 4 * s_.H) : kernel_.forward_packed_size(s_.H, K);
  }
  // Units [begin, end) of the weights that are packed before the steps; with layer normalization as many rows
  // of 4H, which are columns of the product.
  void pack(const ForwardArgs<T, S>& a, int64_t begin, int64_t end) const {
    const auto pack_weight = [&](const GateWeight<T, S>& w, int64_t K) {
      if (s_.norm)
        kernel_.pack_columns(w.stored, K, 1, K, 4 * begin, 4 * end, w.packed);
      else
        kernel_.pack_forward(w.stored, a.H, K, begin, end, w.packed);
    };
    if (pack_ih()) pack_weight(a.ih, a.I);
    if (pack_hh()) pack_weight(a.hh, a.P);
  }

  const Kernels<T, S>& kernel_ = kernels<T, S>();
  const LayerSizes& s_;
  const ForwardPlan& plan_;
  const PackedView* packed_;
  const int64_t N_;
  const at::Tensor x_;  // [N, I]
  const int64_t ih_size_, hh_size_;
  PerDirection ih_offset_, hh_offset_, hr_offset_, hidden_offset_;
  int64_t scratch_offset_ = 0;
  std::array<at::Tensor, 3> weights_[2];
  LayerNorm<T> norm_[2];
  ForwardArgs<T, S> args_[2];
};

template <class T, class S>
class FloatBackward {
  using R = Real<T>;

 public:
  // need_hr[d]: true if dW_hr of direction d is needed.
  FloatBackward(const LayerInputs& in, const LayerSizes& s, const BackwardPlan& plan, bool need_dx,
                const bool (&need_hr)[2])
      : s_(s),
        plan_(plan),
        need_hr_{need_hr[0], need_hr[1]},
        packed_hh_size_(plan.pack_hh ? kernel_.columns_packed_size(4 * s.H, s.P) : 0),
        copy_is_packed_(plan.partition.copies > 1 ? s.D * plan.partition.copies : 0) {
    for (int64_t d = 0; need_dx && d < s.D; ++d) w_ih_[d] = in.weights[d * s.per_direction].contiguous();
  }

  static int64_t gradient_stride(int64_t P) { return kernels<T, S>().padded_columns(P); }

  void reserve(Workspace& space) {
    const int64_t rows = plan_.chunk_steps * s_.B;
    for (int64_t d = 0; d < s_.D; ++d) {
      packed_hh_offset_[d] = space.take<S>(plan_.partition.copies * packed_hh_size_);
      hr_offset_[d] = space.take<S>(s_.proj() ? kernel_.columns_packed_size(s_.P, s_.H) : 0);
      dgates_offset_[d] = space.take<R>(rows * 4 * s_.H);
      dr_offset_[d] = space.take<R>(s_.proj() ? rows * s_.P : 0);
      hidden_offset_[d] = space.take<R>(need_hr_[d] ? rows * s_.H : 0);
      dhh_offset_[d] = space.take<R>(s_.norm ? rows * 4 * s_.H : 0);
      sums_offset_[d] = space.take<R>(s_.norm ? plan_.partition.threads() * kernel_.norm_sums(s_.H) : 0);
    }
    const auto scratch = s_.norm ? kernel_.norm_backward_scratch : kernel_.backward_scratch;
    scratch_offset_ = space.take<R>(plan_.partition.threads() * scratch(s_.H, s_.P));
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights& w, const BackwardBuffers<T>& b) {
    const ThreadPartition& threads = plan_.partition;
    w_hh_[d] = w.hh.contiguous();
    if (s_.proj()) pack_columns<T>(threads.threads(), w.hr, space.at<S>(hr_offset_[d]));
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
                data_of<T>(w_hh_[d]),
                plan_.pack_hh ? space.at<S>(packed_hh_offset_[d]) : nullptr,
                s_.proj() ? space.at<S>(hr_offset_[d]) : nullptr,
                space.at<R>(dgates_offset_[d]),
                s_.proj() ? space.at<R>(dr_offset_[d]) : nullptr,
                need_hr_[d] ? space.at<R>(hidden_offset_[d]) : nullptr,
                b.dh,
                b.dc,
                space.at<R>(scratch_offset_),
                b.masks,
                b.kept_h};
    if (s_.norm) {
      norm_[d] = LayerNorm<T>(w);
      args_[d].norm = norm_[d].weights();
      args_[d].saved_ih = b.gates + s_.rows() * 4 * s_.H, args_[d].saved_hh = b.gates + s_.rows() * 8 * s_.H;
      args_[d].dhh = space.at<R>(dhh_offset_[d]), args_[d].norm_sums = space.at<R>(sums_offset_[d]);
      std::fill_n(args_[d].norm_sums, threads.threads() * kernel_.norm_sums(s_.H), R(0));
    }
    if (plan_.pack_hh && !threads.private_weights())
      for_blocks(threads.threads(), s_.P, kernel_.unit_block, 4 * s_.H * kernel_.unit_block,
                 [&](int64_t begin, int64_t end) { pack(args_[d], begin, end); });
  }

  void select_steps(int64_t d, const Span& span, R* dgates) {
    args_[d].first = span.first, args_[d].steps = span.steps, args_[d].base = span.begin;
    if (dgates) args_[d].dgates = dgates;
  }

  void run(int64_t d, const Member& me) {
    const ThreadPartition& threads = plan_.partition;
    BackwardArgs<T, S> mine = args_[d];
    if (plan_.pack_hh) mine.packed += threads.copy(me.index) * packed_hh_size_;
    // Once for all chunks: in the first one, or, where there are copies, by the thread that is first to run a
    // copy.
    bool hh_is_packed = mine.first + mine.steps < s_.T;
    if (threads.copies > 1) {
      char& copy = copy_is_packed_[d * threads.copies + threads.copy(me.index)];
      hh_is_packed = copy, copy = 1;
    }
    if (plan_.pack_hh && threads.private_weights() && !hh_is_packed)
      pack(mine, me.feature_begin, me.feature_end);
    (s_.norm ? kernel_.norm_backward : kernel_.backward)(mine, me);
  }

  MatrixView<R> dgates(int64_t d) const { return {args_[d].dgates, 4 * s_.H}; }
  MatrixView<R> dhh(int64_t d) const { return s_.norm ? MatrixView<R>{args_[d].dhh, 4 * s_.H} : dgates(d); }
  MatrixView<R> dr(int64_t d) const { return {args_[d].dr, s_.P}; }
  MatrixView<R> hidden(int64_t d) const { return {args_[d].hidden, s_.H}; }

  void input_gradient(int64_t d, int64_t n, R* dx) const {
    const int64_t G = 4 * s_.H;
    const auto product = [&](R* out, int64_t stride, bool add) {
      multiply<R, T>(
          {n, s_.I, G, args_[d].dgates, G, false, data_of<T>(w_ih_[d]), s_.I, add, out, stride, nullptr});
    };
    const bool add = s_.D > 1;
    if (plan_.dx != Gemm::aligned_blas) return product(dx, s_.I, add);
    const at::Tensor aligned = new_aligned(n, s_.I, real_like<T>(w_ih_[d]));
    product(aligned.mutable_data_ptr<R>(), aligned.stride(0), false);
    at::Tensor out = matrix_tensor(dx, n, s_.I, s_.I, 1);
    if (add)
      out.add_(aligned);
    else
      out.copy_(aligned);
  }

  void bias_gradient(int64_t d, int64_t n, bool accumulate, R* db) const {
    if (s_.norm) return;  // the loop has summed them
    const int64_t G = 4 * s_.H;
    const R* dgates = args_[d].dgates;
    constexpr int64_t kColumns = kBiasGradTaskColumns;
    const int64_t grain = kBiasGradTaskMinElements / (n + 1) + 1;
    at::parallel_for(0, (G + kColumns - 1) / kColumns, grain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * kColumns; j < std::min(G, end * kColumns); j += kColumns) {
        const int64_t count = std::min(kColumns, G - j);
        R sums[kColumns];
        kernels<R>().column_sums(dgates + j, n, G, 0, count, sums);
        for (int64_t k = 0; k < count; ++k) db[j + k] = sums[k] + (accumulate ? db[j + k] : R(0));
      }
    });
  }
  void finish_bias(int64_t d, R* db) const {
    if (s_.norm) norm_gradient(d, 1, db);
  }
  // Of the k-th weight of layer normalization, in the order of the contract.
  void norm_gradient(int64_t d, int64_t k, R* dw) const {
    const int64_t H = s_.H, n = k < 4 ? 4 * H : H, members = plan_.partition.threads();
    std::fill_n(dw, n, R(0));
    for (int64_t m = 0; m < members; ++m) {
      const R* sums = args_[d].norm_sums + m * kernel_.norm_sums(H) + NormTerms::of_weight(k) * H;
      for (int64_t j = 0; j < n; ++j) dw[j] += sums[j];
    }
  }

 private:
  void pack(const BackwardArgs<T, S>& a, int64_t begin, int64_t end) const {
    kernel_.pack_columns(a.w_hh, 4 * s_.H, s_.P, 1, begin, end, a.packed);
  }

  const Kernels<T, S>& kernel_ = kernels<T, S>();
  const LayerSizes& s_;
  const BackwardPlan& plan_;
  const bool need_hr_[2];
  const int64_t packed_hh_size_;
  std::vector<char> copy_is_packed_;  // per direction and copy
  PerDirection packed_hh_offset_, hr_offset_, dgates_offset_, dr_offset_, hidden_offset_, dhh_offset_,
      sums_offset_;
  int64_t scratch_offset_ = 0;
  at::Tensor w_ih_[2], w_hh_[2];
  LayerNorm<T> norm_[2];
  BackwardArgs<T, S> args_[2];
};

template <class T, class S>
struct FloatEngine {
  using Number = T;
  using State = Real<T>;
  using Operand = Real<T>;
  using InputGradient = Real<T>;
  using Forward = FloatForward<T, S>;
  using Backward = FloatBackward<T, S>;
  using WeightGradient = FloatWeightGradient<T>;

  static int64_t unit_block() { return kernels<T, S>().unit_block; }
  static at::Tensor operands(const at::Tensor& t) { return to_real<T>(t); }
  static at::Tensor input_gradient_like(const at::Tensor& x) { return real_like<T>(x); }
};

}  // namespace fastlstm
