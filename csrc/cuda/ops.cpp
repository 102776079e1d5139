// The CUDA kernels of fastlstm::native_layer and its backward; the schemas are in fastlstm/ops/schema.py.
#include <torch/library.h>

#include "cuda/layer.h"

TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
  m.impl("native_layer", fastlstm::cuda::layer_forward);
  m.impl("native_layer_backward", fastlstm::cuda::layer_backward);
}
