// What csrc/cuda asks of a device, given by the host, and its ops on CPU tensors as
// fastlstm_cuda_host::native_layer.
#include <ATen/ATen.h>
#include <torch/library.h>

// One translation unit, since the headers are most of what is compiled.
#include "cuda/cell_backward.cu"
#include "cuda/cell_forward.cu"
#include "cuda/device.h"
#include "cuda/layer.cpp"
#include "cuda/layer_backward.cpp"
#include "cuda/layer_forward.cpp"
#include "cuda/layer_persistent.cpp"
#include "cuda/pack_weights.cu"
#include "cuda/persistent_backward_bf16.cu"
#include "cuda/persistent_backward_fp16.cu"
#include "cuda/persistent_backward_tf32.cu"
#include "cuda/persistent_forward_bf16.cu"
#include "cuda/persistent_forward_fp16.cu"
#include "cuda/persistent_forward_tf32.cu"
#include "cuda/products.h"

namespace fastlstm::cuda {

struct OnDeviceOf::Guard {};
OnDeviceOf::OnDeviceOf(const at::Tensor&) {}
OnDeviceOf::~OnDeviceOf() = default;
cudaStream_t OnDeviceOf::stream() const { return nullptr; }

DeviceLimits limits = {8, 227 << 10};
DeviceLimits device_limits() { return limits; }

void check(cudaError_t status) { TORCH_CHECK(status == cudaSuccess); }

// Float32 has its persistent kernels in TF32 alone, so those are what it gets when they are asked for.
Products::Products(at::ScalarType dtype) : tf32_(dtype == at::kFloat) {}
void Products::operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) const {
  // As products.h says: sums in their own type, results rounded once, out dense and of one type or the other.
  const at::ScalarType sum = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(out.scalar_type() == a.scalar_type() || (out.scalar_type() == sum && !add));
  TORCH_CHECK(out.is_contiguous() && a.dim() == out.dim() && b.dim() == out.dim());
  const at::Tensor product = at::matmul(a.to(sum), b.to(sum));
  TORCH_CHECK(product.sizes() == out.sizes());
  out.copy_(add ? out.to(sum) + product : product);
}

}  // namespace fastlstm::cuda

TORCH_LIBRARY_IMPL(fastlstm_cuda_host, CompositeExplicitAutograd, m) {
  m.impl("persistent", [](bool enabled, int64_t sms) {
    fastlstm::cuda::persistent_enabled = enabled;
    fastlstm::cuda::limits.sms = static_cast<int>(sms);
  });
}

TORCH_LIBRARY_IMPL(fastlstm_cuda_host, CPU, m) {
  m.impl("native_layer", fastlstm::cuda::layer_forward);
  m.impl("native_layer_backward", fastlstm::cuda::layer_backward);
}
