// Launch of the step-wise kernels: a grid of (features, rows, layers), or a CTA per row.
#pragma once

#include "cuda/norm_step.h"

namespace fastlstm::cuda {

constexpr int kThreads = 128;

// Runs F::run<V>(s, layer, row, feature) for all of n. Rows beyond the grid's limit of 65,535 CTAs run in a
// loop. Four CTAs per SM leave 128 registers per thread; without the bound ptxas spills in some kernels to
// fit more.
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
  if (n.features == 0 || n.rows == 0) return cudaSuccess;  // an empty grid is an error
  const int64_t vectors = (n.features + V - 1) / V;
  int threads_x = 1;
  while (threads_x < kThreads && threads_x < vectors) threads_x *= 2;
  const int threads_y = kThreads / threads_x;
  const int64_t grid_y = (n.rows + threads_y - 1) / threads_y;
  const dim3 grid(static_cast<unsigned>((vectors + threads_x - 1) / threads_x),
                  static_cast<unsigned>(grid_y < 65535 ? grid_y : 65535), static_cast<unsigned>(n.layers));
  for_each<F, V><<<grid, dim3(threads_x, threads_y), 0, stream>>>(s, n);
  return cudaGetLastError();
}

// Runs F::run<V>(s, layer, row, thread) with kRowThreads threads for each row. Two CTAs per SM leave 255
// registers per thread; with 128 some kernels spill.
template <class F, int V, class S>
__global__ void __launch_bounds__(kRowThreads, 2)
    for_each_row(const __grid_constant__ S s, const __grid_constant__ Extent n) {
  const RowThread thread = {static_cast<int>(threadIdx.x), kRowThreads};
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < n.rows; row += gridDim.x)
    F::template run<V>(s, static_cast<int>(blockIdx.y), row, thread);
}

template <class F, int V, class S>
cudaError_t launch_rows(const S& s, const Extent& n, cudaStream_t stream) {
  if (n.features == 0 || n.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(n.rows < 65535 ? n.rows : 65535), static_cast<unsigned>(n.layers));
  for_each_row<F, V><<<grid, kRowThreads, 0, stream>>>(s, n);
  return cudaGetLastError();
}

}  // namespace fastlstm::cuda
