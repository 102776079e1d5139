// Matrix products through ATen (cuBLAS), at the precision that torch's flags ask of an LSTM.
//
// float32 follows nn.LSTM: torch.backends.cudnn.rnn.fp32_precision ("tf32" unless changed) decides between
// TF32 and IEEE; with torch.backends.cudnn.enabled = False it is torch.backends.cuda.matmul.fp32_precision,
// as there. The flags are read once per call. float16 and bfloat16 multiply in their own type and add in
// float32, float64 is float64.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace fastlstm::cuda {

class Products {
 public:
  explicit Products(at::ScalarType dtype);
  bool tf32() const { return tf32_; }  // what float32 is multiplied as

  // out = a b, or out += a b: a [M, K], b [K, N], out [M, N] and dense, or all three with a batch in front.
  // out is of the operands' type, or, unless adding, of the type they are summed in (Acc in cell_kernels.h).
  void operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add = false) const;

 private:
  std::optional<at::NoTF32Guard>
      ieee_;  // this thread's products are IEEE although the matmul setting says TF32
  bool tf32_ = false;
  bool own_tf32_ = false;  // TF32 although the matmul setting says IEEE
};

}  // namespace fastlstm::cuda
