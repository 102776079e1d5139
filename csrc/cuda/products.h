// Matrix products by cuBLAS, at the precision that torch's flags ask of an LSTM.
//
// float32 is TF32 or IEEE as nn.LSTM's would be: docs/numerics.md, "float32 on a GPU". float16 and bfloat16
// multiply in their own type and add in float32, float64 is float64.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <optional>

struct cublasContext;

namespace fastlstm::cuda {

// For one pass on one thread, device and stream: the flags and torch's cuBLAS handle are read when it is
// made.
class Products {
 public:
  explicit Products(at::ScalarType dtype);
  bool tf32() const;  // whether float32 is multiplied as TF32

  // out = a b, or out += a b: a [M, K], b [K, N], out [M, N] and dense, or all three with a batch in front.
  // out is of the operands' type, or, unless adding, of the type they are summed in (Acc in cell_kernels.h).
  void operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add = false) const;

 private:
  void by_cublas(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) const;

  std::optional<at::NoTF32Guard> ieee_;  // while it lives, this thread's products are IEEE whatever the flags
  cublasContext* cublas_ = nullptr;  // torch's, with the current stream and workspace; null: ATen multiplies
  int type_ = 0, compute_ = 0;       // cudaDataType of the operands, cublasComputeType_t
};

}  // namespace fastlstm::cuda
