// The contract of fastlstm/ops/schema.py in C++: signatures of the native ops and a view of a layer's
// weights.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastlstm {

using OptionalTensor = std::optional<at::Tensor>;

// y, h_n, c_n, cells, reserve
using LayerResults = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using LayerForward = LayerResults(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                  at::TensorList weights, const OptionalTensor& lengths,
                                  const OptionalTensor& reset_mask, bool keep_cells, bool keep_reserve);

// Whether a y that backward was given is none: [0], where its caller has changed it since forward. h is then
// found again from o and c.
inline bool lacks_output(const at::Tensor& y) { return y.dim() == 1 && y.size(0) == 0; }

// dx, dh0, dc0, dweights
using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
using LayerBackward = LayerGradients(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                     const OptionalTensor& dc_n, const OptionalTensor& dcells,
                                     const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                     at::TensorList weights, const OptionalTensor& lengths,
                                     const OptionalTensor& reset_mask, const at::Tensor& y,
                                     const at::Tensor& cells, const at::Tensor& reserve,
                                     c10::List<bool> needs);

// dx, dh0, dc0, dweights as differentiable functions (fastlstm/ops/register.py); gates: of saved_gates
using DifferentiableBackward = LayerGradients(const OptionalTensor& dy, const OptionalTensor& dh_n,
                                              const OptionalTensor& dc_n, const OptionalTensor& dcells,
                                              const at::Tensor& x, const OptionalTensor& h0,
                                              const OptionalTensor& c0, at::TensorList weights,
                                              const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                                              const OptionalTensor& gates, const OptionalTensor& cells,
                                              c10::List<bool> needs);

// The activated gates [D, T, B, 4H] (packed rows: [D, N, 4H]) in the order i, f, g, o, from a reserve.
using SavedGates = at::Tensor(const at::Tensor& reserve, const at::Tensor& x, at::TensorList weights,
                              const OptionalTensor& lengths);

// What is wrong with a layer's arguments: the first thing that was found, nothing if they fit together.
class Misfit {
 public:
  explicit Misfit(const at::Tensor& x) : x_(x) {}

  template <class... Text>
  void unless(bool fits, const Text&... text) {
    if (!found_ && !fits) found_ = c10::str(text...);
  }
  void unless_sizes(const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
    unless(tensor.sizes() == expected, name, " must be ", expected, ", got ", tensor.sizes());
  }
  // Of a dtype, too, and where x is.
  void unless_like(const char* name, const at::Tensor& tensor, at::IntArrayRef expected,
                   at::ScalarType dtype) {
    unless_sizes(name, tensor, expected);
    unless(tensor.scalar_type() == dtype && tensor.device() == x_.device(), name, " must be ", dtype, " on ",
           x_.device(), ", got ", tensor.scalar_type(), " on ", tensor.device());
  }
  void unless_like(const char* name, const OptionalTensor& tensor, at::IntArrayRef expected,
                   at::ScalarType dtype) {
    if (tensor && tensor->defined()) unless_like(name, *tensor, expected, dtype);
  }
  bool found() const { return found_.has_value(); }
  void raise() const { TORCH_CHECK(!found_, *found_); }

 private:
  const at::Tensor& x_;
  std::optional<std::string> found_;
};

// The sizes of a layer, read off x and its weights, and off `lengths` where x may be packed.
struct LayerSizes {
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, D = 0;
  int64_t per_direction = 0;  // weights of one direction
  bool bias = false;
  bool packed = false;  // x is [N, I]: no rows beyond the lengths

  bool proj() const { return P != H; }
  // Of x, y, cells, their gradients and the reserve: padded or packed.
  int64_t rows() const { return rows_; }
  // Of a tensor that has n features in each of these rows.
  at::DimVector per_row(int64_t n) const { return packed ? at::DimVector{rows_, n} : at::DimVector{T, B, n}; }
  at::DimVector reserve() const {
    return packed ? at::DimVector{D, rows_, 4 * H} : at::DimVector{D, T, B, 4 * H};
  }

  LayerSizes(const at::Tensor& x, at::TensorList weights, const OptionalTensor& lengths = {}) {
    Misfit wrong(x);
    read(x, weights, lengths, wrong);
    wrong.raise();
  }
  // A bias differs by its dimension from the weights of the other direction.
  static int64_t weights_per_direction(at::TensorList weights, bool proj) {
    return 2 + 2 * (weights.size() > 2 && weights[2].dim() == 1) + proj;
  }
  // Whether forward's arguments fit together: what the constructor and check_inputs() throw on.
  static bool fit(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                  at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask) {
    Misfit wrong(x);
    LayerSizes s;
    s.read(x, weights, lengths, wrong);
    if (!wrong.found()) s.look_at_inputs(x, h0, c0, lengths, reset_mask, wrong);
    return !wrong.found();
  }
  void check_inputs(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                    const OptionalTensor& lengths, const OptionalTensor& reset_mask) const {
    Misfit wrong(x);
    look_at_inputs(x, h0, c0, lengths, reset_mask, wrong);
    wrong.raise();
  }
  // What backward takes beyond forward's arguments.
  void check_backward(const at::Tensor& x, const OptionalTensor& dy, const OptionalTensor& dh_n,
                      const OptionalTensor& dc_n, const OptionalTensor& dcells, const at::Tensor& y,
                      const at::Tensor& cells, const at::Tensor& reserve,
                      const c10::List<bool>& needs) const {
    const at::ScalarType dtype = x.scalar_type();
    const size_t flags = 3 + D * per_direction;
    Misfit wrong(x);
    wrong.unless(reserve.numel() == D * rows() * 4 * H, "reserve must be kept by forward for a backward");
    wrong.unless_like("reserve", reserve, this->reserve(), dtype);
    if (!lacks_output(y)) wrong.unless_like("y", y, per_row(D * P), dtype);
    wrong.unless_like("cells", cells, per_row(D * H), dtype);
    wrong.unless_like("dy", dy, per_row(D * P), dtype);
    wrong.unless_like("dh_n", dh_n, {D, B, P}, dtype);
    wrong.unless_like("dc_n", dc_n, {D, B, H}, dtype);
    wrong.unless_like("dcells", dcells, per_row(D * H), dtype);
    wrong.unless(needs.size() == flags, "needs must have ", flags, " flags, got ", needs.size());
    wrong.raise();
  }

 private:
  LayerSizes() = default;

  void read(const at::Tensor& x, at::TensorList weights, const OptionalTensor& lengths, Misfit& wrong) {
    packed = x.dim() == 2 && lengths && lengths->defined() && lengths->is_cpu();
    wrong.unless(packed || x.dim() == 3, "x must be [T, B, I], got ", x.sizes());
    wrong.unless(weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
                 "weights must begin with weight_ih [4H, I] and weight_hh [4H, P]");
    if (wrong.found()) return;
    I = x.size(-1);
    if (packed) {
      read_lengths(x, *lengths, wrong);
    } else {
      T = x.size(0), B = x.size(1), rows_ = T * B;
    }
    wrong.unless(T > 0, "Expected sequence length to be larger than 0 in RNN");
    H = weights[0].size(0) / 4, P = weights[1].size(1);
    per_direction = weights_per_direction(weights, P != H);
    bias = per_direction > 3;
    D = static_cast<int64_t>(weights.size()) / per_direction;
    wrong.unless(D * per_direction == static_cast<int64_t>(weights.size()) && (D == 1 || D == 2),
                 "weights must be ", per_direction, " tensors for each of 1 or 2 directions, got ",
                 weights.size());
    if (wrong.found()) return;
    for (int64_t d = 0; d < D; ++d) {
      const at::Tensor* w = weights.data() + d * per_direction;
      wrong.unless_sizes("weight_ih", w[0], {4 * H, I});
      wrong.unless_sizes("weight_hh", w[1], {4 * H, P});
      if (bias) wrong.unless_sizes("bias_ih", w[2], {4 * H});
      if (bias) wrong.unless_sizes("bias_hh", w[3], {4 * H});
      if (proj()) wrong.unless_sizes("weight_hr", w[per_direction - 1], {P, H});
    }
    for (const at::Tensor& w : weights)
      wrong.unless(w.scalar_type() == x.scalar_type() && w.device() == x.device(), "weights must be ",
                   x.scalar_type(), " on ", x.device(), " as x is, got ", w.scalar_type(), " on ",
                   w.device());
  }
  // T, B and N of packed rows.
  void read_lengths(const at::Tensor& x, const at::Tensor& lengths, Misfit& wrong) {
    wrong.unless(lengths.dim() == 1 && lengths.scalar_type() == at::kLong,
                 "lengths of packed rows must be int64 [B], got ", lengths.scalar_type(), " ",
                 lengths.sizes());
    if (wrong.found()) return;
    const at::Tensor own = lengths.contiguous();
    const int64_t* of_row = own.const_data_ptr<int64_t>();
    B = lengths.size(0), T = B > 0 ? of_row[0] : 0, rows_ = x.size(0);
    int64_t left = rows_;
    for (int64_t b = 0; b < B && left >= 0; ++b) {
      const bool fits = of_row[b] >= 0 && of_row[b] <= of_row[std::max<int64_t>(0, b - 1)];
      left = fits && of_row[b] <= left ? left - of_row[b] : -1;
    }
    wrong.unless(left == 0, "lengths of packed rows must not rise and have the sum N=", rows_, ", got ",
                 at::IntArrayRef(of_row, B));
  }
  void look_at_inputs(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                      const OptionalTensor& lengths, const OptionalTensor& reset_mask, Misfit& wrong) const {
    wrong.unless_like("h0", h0, {D, B, P}, x.scalar_type());
    wrong.unless_like("c0", c0, {D, B, H}, x.scalar_type());
    wrong.unless_like("lengths", lengths, {B}, at::kLong);
    wrong.unless_like("reset_mask", reset_mask, {T, B}, at::kBool);
    wrong.unless(!packed || !reset_mask, "reset_mask must be None with packed rows");
  }

  int64_t rows_ = 0;
};

// The weights of direction d.
struct DirectionWeights {
  at::Tensor ih, hh, bias_ih, bias_hh, hr;  // undefined where absent

  DirectionWeights(const LayerSizes& s, at::TensorList weights, int64_t d) {
    const at::Tensor* w = weights.data() + d * s.per_direction;
    ih = w[0], hh = w[1];
    if (s.bias) bias_ih = w[2], bias_hh = w[3];
    if (s.proj()) hr = w[s.per_direction - 1];
  }
};

}  // namespace fastlstm
