// Matrix products through ATen (cuBLAS), at the precision that torch's flags ask of an LSTM.
//
// float32 is TF32 or IEEE as nn.LSTM's would be: docs/design.md, "float32 on a GPU". The flags are read once
// per call, forward or backward. float16 and bfloat16 multiply in their own type and add in float32, float64
// is float64.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace fastlstm::cuda {

class Products {
 public:
  explicit Products(at::ScalarType dtype);

  // out = a b, or out += a b: a [M, K], b [K, N], out [M, N] and dense, or all three with a batch in front.
  // out is of the operands' type, or, unless adding, of the type they are summed in (Acc in cell_kernels.h).
  void operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add = false) const;

 private:
  std::optional<at::NoTF32Guard>
      ieee_;               // this thread's products are IEEE although the matmul setting says TF32
  bool own_tf32_ = false;  // TF32 although the matmul setting says IEEE
};

}  // namespace fastlstm::cuda
