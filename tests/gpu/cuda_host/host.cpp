// What csrc/cuda asks of a device, given by the host, and its ops on CPU tensors as
// fastlstm_cuda_host::native_layer.
#include <torch/library.h>

// One translation unit, since torch's headers are most of what is compiled; kernels.cpp is the other.
#include "cuda/device.h"
#include "cuda/layer.cpp"
#include "cuda/layer_backward.cpp"
#include "cuda/layer_forward.cpp"
#include "cuda/layer_persistent.cpp"
#include "cuda/products.cpp"
#include "cuda/warp.cuh"
// after products.cpp, whose weak declarations it defines
#include "blas.h"

namespace fastlstm::cuda {

struct DeviceGuard::Guard {};
DeviceGuard::DeviceGuard(const at::Tensor&) {}
DeviceGuard::~DeviceGuard() = default;
cudaStream_t DeviceGuard::stream() const { return nullptr; }

// Few SMs, so that groups of the grid variant process several batch tiles; clusters need no number of SMs.
DeviceLimits device_limits() { return {8, 227 << 10, 16}; }

void check(cudaError_t status) { TORCH_CHECK(status == cudaSuccess); }

// Gemm alone: whether cuBLAS was called, and in which compute type; 0 where ATen multiplied.
int64_t multiply(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool add) {
  host::calls = host::last_compute = 0;
  Gemm(a.scalar_type())(out, a, b, add);
  return host::calls ? host::last_compute : 0;
}

static_assert(!supports_steps(3) && supports_steps(4) && supports_steps((int64_t{1} << 31) - 2) &&
              !supports_steps((int64_t{1} << 31) - 1));

}  // namespace fastlstm::cuda

TORCH_LIBRARY_IMPL(fastlstm_cuda_host, CompositeExplicitAutograd, m) {
  m.impl("persistent", [](bool enabled, std::string_view tier) {
    fastlstm::cuda::persistent_enabled = enabled;
    fastlstm::cuda::persistent_tier = tier.empty() ? '\0' : tier[0];
  });
  m.impl("launches_left", [](int64_t n) { fastlstm::cuda::launches_left = static_cast<int>(n); });
  m.impl("occupancy_queries", [] { return static_cast<int64_t>(fastlstm::cuda::occupancy_queries); });
}

TORCH_LIBRARY_IMPL(fastlstm_cuda_host, CPU, m) {
  m.impl("native_layer", fastlstm::forward_kernel<fastlstm::cuda::layer_forward>);
  m.impl("native_layer_backward", fastlstm::backward_kernel<fastlstm::cuda::layer_backward>);
  m.impl("multiply", fastlstm::cuda::multiply);
}
