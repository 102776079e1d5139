// The CUDA kernels of fastlstm::native_layer and its backward; the schemas are in fastlstm/ops/schema.py.
#include <ATen/ops/clone.h>
#include <torch/library.h>

#include "cuda/layer.h"

namespace {

// A reserve of the CUDA kernels has the gates in nn.LSTM's order; past a length it is uninitialized.
at::Tensor gates(const at::Tensor& reserve, const at::Tensor&, at::TensorList,
                 const fastlstm::OptionalTensor&) {
  return reserve.clone();
}
static_assert(std::is_same_v<decltype(gates), fastlstm::SavedGates>);

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
  m.impl("native_gates", gates);
  m.impl("native_layer", fastlstm::forward_kernel<fastlstm::cuda::layer_forward>);
  m.impl("native_layer_backward", fastlstm::backward_kernel<fastlstm::cuda::layer_backward>);
}
