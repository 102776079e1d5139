// Stands before csrc/cuda/launch.cuh on the include path of tests/gpu/test_cuda_host.py: the kernels' bodies
// in host loops.
#pragma once

#include <algorithm>

#include "cuda/norm_step.h"

namespace fastlstm::cuda {

constexpr struct {
  int64_t z = 3;  // fewer than some tests have steps
} gridDim;

template <class F, int V, class S>
cudaError_t launch(const S& s, const Extent& n, cudaStream_t) {
  for (int layer = 0; layer < std::min<int64_t>(n.layers, gridDim.z); ++layer)
    for (int64_t row = 0; row < n.rows; ++row)
      for (int64_t feature = 0; feature < n.features; feature += V)
        F::template run<V>(s, layer, row, feature);
  return cudaSuccess;
}

template <class F, int V, class S>
cudaError_t launch_rows(const S& s, const Extent& n, cudaStream_t) {
  for (int layer = 0; layer < n.layers; ++layer)
    for (int64_t row = 0; row < n.rows; ++row) F::template run<V>(s, layer, row, RowThread{0, 1});
  return cudaSuccess;
}

}  // namespace fastlstm::cuda
