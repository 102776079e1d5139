// The weights of a frozen layer in one buffer of bytes, laid out as this machine's kernels read them: what
// fastlstm.freeze packs once, and the op fastlstm::frozen_layer reads in every call.
//
// A header, then for each direction its parts, each aligned to 64 bytes: weight_ih, weight_hh and, with
// projection, weight_hr in the form's layout; for int8 their scales and row sums; bias_ih, bias_hh and their
// sum. The header names form and layout, so that a buffer from another machine can be read and packed again.
#pragma once

#include "contract.h"
#include "cpu/int8.h"
#include "cpu/plan.h"

namespace fastlstm {

// The order of the elements of a weight [rows, K] in its part.
enum class PackedLayout : int64_t {
  panels,       // cpu/pack_forward.h, of Real<T>; weight_hr as columns (Kernels::pack_columns)
  bf16_panels,  // the same with panels of PanelBf16
  bf16_tiles,   // cpu/bf16.h, pack_gates; weight_hr by pack_rows
  int8_blocks,  // cpu/int8.h
};

struct PackedHeader {
  int64_t magic;
  int64_t dtype;   // of x, an at::ScalarType
  int64_t frozen;  // Frozen
  PackedLayout layout;
  int64_t width, group;  // of a vector of Real<T>, in elements; of int8 products
  int64_t I, H, P, D, bias;
  int64_t reserved[5];

  bool proj() const { return P != H; }
  at::ScalarType scalar_type() const { return static_cast<at::ScalarType>(dtype); }
  int64_t real_bytes() const { return scalar_type() == at::kDouble ? 8 : 4; }
  LayerSizes::Known known() const { return {I, H, P, D, scalar_type()}; }
};
static_assert(sizeof(PackedHeader) == 128);

// A matrix of a direction.
enum class PackedWeight { ih, hh, hr };

// Reads a buffer; valid while it lives.
class PackedView {
 public:
  explicit PackedView(const at::Tensor& buffer);  // raises if it is none, or of another length
  // A view of a buffer that is still to be filled.
  PackedView(const PackedHeader& header, uint8_t* data);

  const PackedHeader& header() const { return header_; }
  template <class T>
  T* weight(PackedWeight w, int64_t d) const {
    return at<T>(first_of(w), d);
  }
  float* scale(PackedWeight w, int64_t d) const { return at<float>(first_of(w) + 1, d); }
  int32_t* row_sums(PackedWeight w, int64_t d) const { return at<int32_t>(first_of(w) + 2, d); }
  int8::Weight int8_weight(PackedWeight w, int64_t d) const {
    return {weight<int8_t>(w, d), scale(w, d), row_sums(w, d)};
  }
  // [4H]: of x's dtype, k = 0 or 1; the sum of both is Real.
  template <class T>
  T* bias(int k, int64_t d) const {
    return at<T>(k, d);
  }
  template <class R>
  R* bias_sum(int64_t d) const {
    return at<R>(2, d);
  }

  int64_t rows(PackedWeight w) const { return w == PackedWeight::hr ? header_.P : 4 * header_.H; }
  int64_t depth(PackedWeight w) const {
    return w == PackedWeight::ih ? header_.I : w == PackedWeight::hh ? header_.P : header_.H;
  }
  int64_t weights() const { return header_.proj() ? 3 : 2; }
  // Elements of a weight's part, and where row r of it is, column k.
  int64_t elements(PackedWeight w) const;
  int64_t position(PackedWeight w, int64_t r, int64_t k) const;
  // int8: where the scale and the sum of row r are.
  int64_t row_position(PackedWeight w, int64_t r) const;
  int64_t bytes() const { return static_cast<int64_t>(sizeof(PackedHeader)) + header_.D * begin_[kParts]; }

 private:
  static constexpr int kParts = 12;  // three biases, then three of each weight
  static int first_of(PackedWeight w) { return 3 + 3 * static_cast<int>(w); }
  template <class T>
  T* at(int part, int64_t d) const {
    return reinterpret_cast<T*>(data_ + sizeof(PackedHeader) + d * begin_[kParts] + begin_[part]);
  }
  int64_t part_bytes(int part) const;
  void place();

  PackedHeader header_;
  uint8_t* data_;
  int64_t begin_[kParts + 1];  // of each part of a direction
};

// The header of a buffer for this machine.
PackedHeader packed_header(at::ScalarType dtype, Frozen frozen, int64_t I, int64_t H, int64_t P, int64_t D,
                           bool bias);
// Returns true if this machine's kernels read the layout.
bool is_native(const PackedHeader& header);
// The same weights for this machine.
at::Tensor packed_here(const at::Tensor& packed);

// weights: in the contract's order, matrices of x's dtype, of bfloat16 (Frozen::bfloat16) or int8; scales: of
// int8 [rows] float32, one for each matrix. Biases are of x's dtype.
at::Tensor pack_layer(at::ScalarType dtype, Frozen frozen, at::TensorList weights, at::TensorList scales);
// The inverse.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> unpack_layer(const at::Tensor& packed);

}  // namespace fastlstm
