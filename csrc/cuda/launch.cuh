// How the kernels are laid over the device: a grid of (features, rows, layers).
#pragma once

#include "cuda/step.h"

namespace fastlstm::cuda {

constexpr int kThreads = 128;

// F::run<V>(s, layer, row, feature) for all of them. Rows beyond the grid's limit of 65,535 blocks are looped
// over. Four blocks an SM leave 128 registers a thread; left to itself ptxas spills some kernels to fit more
// blocks.
template <class F, int V, class S>
__global__ void __launch_bounds__(kThreads, 4)
    for_each(const __grid_constant__ S s, const __grid_constant__ Extent n) {
  const int64_t feature = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (feature >= n.features) return;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.y;
#pragma unroll 1
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < n.rows;
       row += stride) {
    F::template run<V>(s, static_cast<int>(blockIdx.z), row, feature);
  }
}

template <class F, int V, class S>
cudaError_t launch(const S& s, const Extent& n, cudaStream_t stream) {
  if (n.features == 0 || n.rows == 0) return cudaSuccess;  // a grid of no blocks is an error
  const int64_t units = (n.features + V - 1) / V;
  int wide = 1;
  while (wide < kThreads && wide < units) wide *= 2;
  const int tall = kThreads / wide;
  const int64_t blocks = (n.rows + tall - 1) / tall;
  const dim3 grid(static_cast<unsigned>((units + wide - 1) / wide),
                  static_cast<unsigned>(blocks < 65535 ? blocks : 65535), static_cast<unsigned>(n.layers));
  for_each<F, V><<<grid, dim3(wide, tall), 0, stream>>>(s, n);
  return cudaGetLastError();
}

}  // namespace fastlstm::cuda
