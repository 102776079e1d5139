// The contract of fastlstm/ops/schema.py in C++: signatures of the native ops and a view of a layer's
// weights.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace fastlstm {

using OptionalTensor = std::optional<at::Tensor>;

// Signatures of ops over a layer's inputs, with other arguments in the place that fastlstm/ops/schema.py has
// for them: OverInputs of forward's, OverGradients of backward's, which begin with the results' gradients.
using Input = const at::Tensor&;
using Option = const OptionalTensor&;
template <class Result, class... Others>
using OverInputs = Result(Input x, Option h0, Option c0, at::TensorList weights, Option lengths,
                          Option reset_mask, Others..., Option recurrent_mask, Option zoneout_h,
                          Option zoneout_c);
template <class Result, class... Others>
using OverGradients = Result(Option dy, Option dh_n, Option dc_n, Option dcells, Input x, Option h0,
                             Option c0, at::TensorList weights, Option lengths, Option reset_mask, Others...,
                             Option recurrent_mask, Option zoneout_h, Option zoneout_c);

// y, h_n, c_n, cells, reserve
using LayerResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// keep_cells, keep_reserve
using LayerForward = OverInputs<LayerResults, bool, bool>;

// Whether a y that backward was given is none: [0], where its caller has changed it since forward. h is then
// found again from o and c.
inline bool lacks_output(const at::Tensor& y) { return y.dim() == 1 && y.size(0) == 0; }

// dx, dh0, dc0, dweights
using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
// y, cells, reserve, needs
using LayerBackward = OverGradients<LayerGradients, Input, Input, Input, c10::List<bool>>;

// dx, dh0, dc0, dweights as differentiable functions (fastlstm/ops/register.py), from gates (of saved_gates),
// cells, needs
using DifferentiableBackward = OverGradients<LayerGradients, Option, Option, c10::List<bool>>;

// The activated gates [D, T, B, 4H] (packed rows: [D, N, 4H]) in the order i, f, g, o, from a reserve.
using SavedGates = at::Tensor(const at::Tensor& reserve, const at::Tensor& x, at::TensorList weights,
                              const OptionalTensor& lengths);

inline const OptionalTensor kNoTensor;

// Arguments of a layer's op, by reference: valid for the call only, never stored. LayerSizes checks them.
struct LayerInputs {
  const at::Tensor& x;  // [T, B, I], or packed rows [N, I]
  const OptionalTensor &h0, &c0;
  at::TensorList weights;
  const OptionalTensor &lengths, &reset_mask;
  const OptionalTensor &recurrent_mask = kNoTensor, &zoneout_h = kNoTensor, &zoneout_c = kNoTensor;

  bool masked() const { return recurrent_mask || zoneout_h || zoneout_c; }

  // The options of a call: tensors without gradient.
  static constexpr size_t kOptions = 5;
  using Options = std::array<OptionalTensor, kOptions>;
  std::array<const OptionalTensor*, kOptions> options() const {
    return {&lengths, &reset_mask, &recurrent_mask, &zoneout_h, &zoneout_c};
  }
  static LayerInputs with_options(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                  at::TensorList weights, const Options& o) {
    return {x, h0, c0, weights, o[0], o[1], o[2], o[3], o[4]};
  }
};
// Gradients of a layer's results, each absent where it is zero.
struct ResultGradients {
  const OptionalTensor &dy, &dh_n, &dc_n, &dcells;
};
// What forward saved for backward; y may be empty (lacks_output).
struct SavedResults {
  const at::Tensor &y, &cells, &reserve;
};

// Calls an op over inputs, or over gradients and inputs.
template <class Op, class... Others>
auto call(const Op& op, const LayerInputs& in, Others&&... others) {
  return op.call(in.x, in.h0, in.c0, in.weights, in.lengths, in.reset_mask, std::forward<Others>(others)...,
                 in.recurrent_mask, in.zoneout_h, in.zoneout_c);
}
template <class Op, class... Others>
auto call(const Op& op, const ResultGradients& grads, const LayerInputs& in, Others&&... others) {
  return op.call(grads.dy, grads.dh_n, grads.dc_n, grads.dcells, in.x, in.h0, in.c0, in.weights, in.lengths,
                 in.reset_mask, std::forward<Others>(others)..., in.recurrent_mask, in.zoneout_h,
                 in.zoneout_c);
}
// f as a kernel of the forward op, and of the backward op.
template <LayerResults (*f)(const LayerInputs&, bool keep_cells, bool keep_reserve)>
LayerResults forward_kernel(Input x, Option h0, Option c0, at::TensorList weights, Option lengths,
                            Option reset_mask, bool keep_cells, bool keep_reserve, Option recurrent_mask,
                            Option zoneout_h, Option zoneout_c) {
  return f({x, h0, c0, weights, lengths, reset_mask, recurrent_mask, zoneout_h, zoneout_c}, keep_cells,
           keep_reserve);
}
template <LayerGradients (*f)(const ResultGradients&, const LayerInputs&, const SavedResults&,
                              const c10::List<bool>& needs)>
LayerGradients backward_kernel(Option dy, Option dh_n, Option dc_n, Option dcells, Input x, Option h0,
                               Option c0, at::TensorList weights, Option lengths, Option reset_mask, Input y,
                               Input cells, Input reserve, c10::List<bool> needs, Option recurrent_mask,
                               Option zoneout_h, Option zoneout_c) {
  return f({dy, dh_n, dc_n, dcells},
           {x, h0, c0, weights, lengths, reset_mask, recurrent_mask, zoneout_h, zoneout_c},
           {y, cells, reserve}, needs);
}

// Collects the first expectation that a layer's arguments do not meet.
class ArgumentCheck {
 public:
  explicit ArgumentCheck(const at::Tensor& x) : x_(x) {}

  template <class... Text>
  void expect(bool met, const Text&... text) {
    if (!error_ && !met) error_ = c10::str(text...);
  }
  void expect_sizes(const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
    expect(tensor.sizes() == expected, name, " must be ", expected, ", got ", tensor.sizes());
  }
  // Of a dtype, too, and where x is.
  void expect_like(const char* name, const at::Tensor& tensor, at::IntArrayRef expected,
                   at::ScalarType dtype) {
    expect_sizes(name, tensor, expected);
    expect(tensor.scalar_type() == dtype && tensor.device() == x_.device(), name, " must be ", dtype, " on ",
           x_.device(), ", got ", tensor.scalar_type(), " on ", tensor.device());
  }
  void expect_like(const char* name, const OptionalTensor& tensor, at::IntArrayRef expected,
                   at::ScalarType dtype) {
    if (tensor && tensor->defined()) expect_like(name, *tensor, expected, dtype);
  }
  bool failed() const { return error_.has_value(); }
  void raise() const { TORCH_CHECK(!error_, *error_); }

 private:
  const at::Tensor& x_;
  std::optional<std::string> error_;
};

// A direction's weights of layer normalization: gain and bias of W_ih x [4H], of W_hh h [4H] and of c [H].
inline constexpr int64_t kNormWeights = 6;
inline constexpr const char* kNormNames[kNormWeights] = {"weight_ln_ih", "bias_ln_ih",  "weight_ln_hh",
                                                         "bias_ln_hh",   "weight_ln_c", "bias_ln_c"};

// The sizes of a layer, read off x and its weights, and off `lengths` where x may be packed.
struct LayerSizes {
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, D = 0;
  int64_t per_direction = 0;  // weights of one direction
  bool bias = false;
  bool norm = false;    // layer normalization
  bool packed = false;  // x is [N, I]: no rows beyond the lengths

  bool proj() const { return P != H; }
  // Of x, y, cells, their gradients and the reserve: padded or packed.
  int64_t rows() const { return rows_; }
  // Of a tensor that has n features in each of these rows.
  at::DimVector per_row(int64_t n) const { return packed ? at::DimVector{rows_, n} : at::DimVector{T, B, n}; }
  // Features of a row of the reserve.
  int64_t reserved() const { return (norm ? 12 : 4) * H; }
  at::DimVector reserve() const {
    return packed ? at::DimVector{D, rows_, reserved()} : at::DimVector{D, T, B, reserved()};
  }
  // Index of the first weight of layer normalization among a direction's.
  int64_t first_norm() const { return bias ? 4 : 2; }

  // Raises if the inputs do not fit together.
  explicit LayerSizes(const LayerInputs& in) {
    ArgumentCheck check(in.x);
    read(in, check);
    check.raise();
  }
  // Biases, gains among them, differ by their dimension from the weights that follow.
  static int64_t vectors_per_direction(at::TensorList weights) {
    size_t k = 2;
    while (k < weights.size() && weights[k].dim() == 1) ++k;
    return static_cast<int64_t>(k) - 2;
  }
  static bool has_norm(at::TensorList weights) { return vectors_per_direction(weights) >= kNormWeights; }
  static int64_t weights_per_direction(at::TensorList weights, bool proj) {
    const int64_t n = vectors_per_direction(weights), norm = n >= kNormWeights ? kNormWeights : 0;
    return 2 + 2 * (n > norm) + norm + proj;
  }
  // Returns true if the constructor raises nothing.
  static bool fit(const LayerInputs& in) {
    ArgumentCheck check(in.x);
    LayerSizes s;
    s.read(in, check);
    return !check.failed();
  }
  // Of a layer whose weights of these sizes and this dtype are packed elsewhere; in.weights is not read.
  struct Known {
    int64_t I, H, P, D;
    at::ScalarType dtype;
  };
  LayerSizes(const LayerInputs& in, const Known& known) {
    ArgumentCheck check(in.x);
    read(in, known, check);
    check.raise();
  }
  static bool fit(const LayerInputs& in, const Known& known) {
    ArgumentCheck check(in.x);
    LayerSizes s;
    s.read(in, known, check);
    return !check.failed();
  }
  // Raises if backward's further arguments do not match forward's inputs.
  void check_backward(const at::Tensor& x, const ResultGradients& grads, const SavedResults& saved,
                      const c10::List<bool>& needs) const {
    const at::ScalarType dtype = x.scalar_type();
    ArgumentCheck check(x);
    check.expect(saved.reserve.numel() == D * rows() * reserved(),
                 "reserve must be kept by forward for a backward");
    check.expect_like("reserve", saved.reserve, reserve(), dtype);
    if (!lacks_output(saved.y)) check.expect_like("y", saved.y, per_row(D * P), dtype);
    check.expect_like("cells", saved.cells, per_row(D * H), dtype);
    check.expect_like("dy", grads.dy, per_row(D * P), dtype);
    check.expect_like("dh_n", grads.dh_n, {D, B, P}, dtype);
    check.expect_like("dc_n", grads.dc_n, {D, B, H}, dtype);
    check.expect_like("dcells", grads.dcells, per_row(D * H), dtype);
    const size_t flags = needs_flags();
    check.expect(needs.size() == flags || needs.size() == flags + 1, "needs must have ", flags, " or ",
                 flags + 1, " flags, got ", needs.size());
    check.raise();
  }
  // Returns true if backward gives the gradient of W_ih x [., D*4H] in place of dx: a flag of `needs` after
  // those of the inputs.
  bool wants_dgates(const c10::List<bool>& needs) const {
    return needs.size() > needs_flags() && needs[needs_flags()];
  }
  int64_t dx_features(const c10::List<bool>& needs) const { return wants_dgates(needs) ? D * 4 * H : I; }

 private:
  LayerSizes() = default;
  size_t needs_flags() const { return 3 + D * per_direction; }  // of x, h0, c0 and the weights

  void read(const LayerInputs& in, ArgumentCheck& check) {
    const auto& x = in.x;
    const auto& weights = in.weights;
    expect_dims(in, check);
    check.expect(weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
                 "weights must begin with weight_ih [4H, I] and weight_hh [4H, P]");
    if (check.failed()) return;
    read_rows(in, check);
    H = weights[0].size(0) / 4, P = weights[1].size(1);
    per_direction = weights_per_direction(weights, P != H);
    norm = has_norm(weights);
    bias = per_direction > 3 + norm * kNormWeights;
    D = static_cast<int64_t>(weights.size()) / per_direction;
    check.expect(D * per_direction == static_cast<int64_t>(weights.size()) && (D == 1 || D == 2),
                 "weights must be ", per_direction, " tensors for each of 1 or 2 directions, got ",
                 weights.size());
    if (check.failed()) return;
    for (int64_t d = 0; d < D; ++d) {
      const at::Tensor* w = weights.data() + d * per_direction;
      check.expect_sizes("weight_ih", w[0], {4 * H, I});
      check.expect_sizes("weight_hh", w[1], {4 * H, P});
      if (bias) check.expect_sizes("bias_ih", w[2], {4 * H});
      if (bias) check.expect_sizes("bias_hh", w[3], {4 * H});
      for (int64_t k = 0; norm && k < kNormWeights; ++k)
        check.expect_sizes(kNormNames[k], w[first_norm() + k], {k < 4 ? 4 * H : H});
      if (proj()) check.expect_sizes("weight_hr", w[per_direction - 1], {P, H});
    }
    for (const at::Tensor& w : weights)
      check.expect(w.scalar_type() == x.scalar_type() && w.device() == x.device(), "weights must be ",
                   x.scalar_type(), " on ", x.device(), " as x is, got ", w.scalar_type(), " on ",
                   w.device());
    if (!check.failed()) expect_rest(in, check);
  }
  void read(const LayerInputs& in, const Known& known, ArgumentCheck& check) {
    expect_dims(in, check);
    if (check.failed()) return;
    read_rows(in, check);
    check.expect(I == known.I, "x must have input_size=", known.I, " features, got ", I);
    check.expect(in.x.scalar_type() == known.dtype && in.x.is_cpu(), "x must be ", known.dtype,
                 " on cpu as the frozen layer is, got ", in.x.scalar_type(), " on ", in.x.device());
    H = known.H, P = known.P, D = known.D;
    if (!check.failed()) expect_rest(in, check);
  }
  void expect_dims(const LayerInputs& in, ArgumentCheck& check) {
    packed = in.x.dim() == 2 && in.x.is_cpu() && in.lengths && in.lengths->defined() && in.lengths->is_cpu();
    check.expect(packed || in.x.dim() == 3, "x must be [T, B, I], got ", in.x.sizes());
  }
  void read_rows(const LayerInputs& in, ArgumentCheck& check) {
    I = in.x.size(-1);
    if (packed) {
      read_lengths(in.x, *in.lengths, check);
    } else {
      T = in.x.size(0), B = in.x.size(1), rows_ = T * B;
    }
    check.expect(T > 0, "Expected sequence length to be larger than 0 in RNN");
  }
  // States and options, whose sizes follow from x and the weights.
  void expect_rest(const LayerInputs& in, ArgumentCheck& check) {
    check.expect_like("h0", in.h0, {D, B, P}, in.x.scalar_type());
    check.expect_like("c0", in.c0, {D, B, H}, in.x.scalar_type());
    check.expect_like("lengths", in.lengths, {B}, at::kLong);
    check.expect_like("reset_mask", in.reset_mask, {T, B}, at::kBool);
    check.expect(!packed || !in.reset_mask, "reset_mask must be None with packed rows");
    check.expect(!packed || !in.masked(), "masks must be None with packed rows");
    if (!in.masked()) return;
    check.expect_like("recurrent_mask", in.recurrent_mask, {D, T, B, P}, in.x.scalar_type());
    expect_share("zoneout_h", in.zoneout_h, P, in, check);
    expect_share("zoneout_c", in.zoneout_c, H, in, check);
  }
  void expect_share(const char* name, const OptionalTensor& share, int64_t n, const LayerInputs& in,
                    ArgumentCheck& check) const {
    const bool flags = share && share->scalar_type() == at::kBool;
    check.expect_like(name, share, {D, T, B, n}, flags ? at::kBool : in.x.scalar_type());
  }
  // T, B and N of packed rows.
  void read_lengths(const at::Tensor& x, const at::Tensor& lengths, ArgumentCheck& check) {
    check.expect(lengths.dim() == 1 && lengths.scalar_type() == at::kLong,
                 "lengths of packed rows must be int64 [B], got ", lengths.scalar_type(), " ",
                 lengths.sizes());
    if (check.failed()) return;
    const at::Tensor values = lengths.contiguous();
    const int64_t* of_row = values.const_data_ptr<int64_t>();
    B = lengths.size(0), T = B > 0 ? of_row[0] : 0, rows_ = x.size(0);
    int64_t left = rows_;
    for (int64_t b = 0; b < B && left >= 0; ++b) {
      const bool fits = of_row[b] >= 0 && of_row[b] <= of_row[std::max<int64_t>(0, b - 1)];
      left = fits && of_row[b] <= left ? left - of_row[b] : -1;
    }
    check.expect(left == 0, "lengths of packed rows must not rise and have the sum N=", rows_, ", got ",
                 at::IntArrayRef(of_row, B));
  }
  int64_t rows_ = 0;
};

// The weights of direction d.
struct DirectionWeights {
  at::Tensor ih, hh, bias_ih, bias_hh, hr;    // undefined where absent
  std::array<at::Tensor, kNormWeights> norm;  // undefined without layer normalization

  DirectionWeights() = default;
  DirectionWeights(const LayerSizes& s, at::TensorList weights, int64_t d) {
    const at::Tensor* w = weights.data() + d * s.per_direction;
    ih = w[0], hh = w[1];
    if (s.bias) bias_ih = w[2], bias_hh = w[3];
    for (int64_t k = 0; s.norm && k < kNormWeights; ++k) norm[k] = w[s.first_norm() + k];
    if (s.proj()) hr = w[s.per_direction - 1];
  }
};

}  // namespace fastlstm
