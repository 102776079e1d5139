// GEMM by cuBLAS, at the precision that torch's flags select for an LSTM.
//
// float32 uses TF32 or IEEE as nn.LSTM would (docs/numerics.md, "float32 on a GPU"). float16 and bfloat16 are
// accumulated in float32, float64 in float64.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <optional>

struct cublasContext;

namespace fastlstm::cuda {

// For one pass on one thread, device and stream; the constructor reads the flags and torch's cuBLAS handle.
class Gemm {
 public:
  explicit Gemm(at::ScalarType dtype);
  bool tf32() const;  // float32 GEMMs use TF32

  // out = a b, or out += a b: a [M, K], b [K, N], out [M, N], contiguous; or all three with a batch
  // dimension. out has the operands' dtype, or, unless adding, the accumulation dtype (Acc in
  // cell_kernels.h).
  void operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add = false) const;

 private:
  void cublas_gemm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) const;

  std::optional<at::NoTF32Guard> ieee_;  // while it lives, this thread's GEMMs use IEEE whatever the flags
  cublasContext* cublas_ = nullptr;  // torch's, with the current stream and workspace; null: ATen multiplies
  int type_ = 0, compute_ = 0;       // cudaDataType of the operands, cublasComputeType_t
};

}  // namespace fastlstm::cuda
