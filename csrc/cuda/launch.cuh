// How the kernels are laid over the device: a grid of (features, rows, layers), and the widest access that
// fits.
#pragma once

#include "cuda/step.h"

namespace fastlstm::cuda {

constexpr int kThreads = 128;
// Features a thread takes where sizes and addresses allow: 16-byte accesses of the accumulation type.
template <class T>
constexpr int kWidth = 16 / sizeof(Acc<T>);

// Whether a row of n elements of T, V at a time, can start at p; null fits.
template <int V, class T>
bool fits(int64_t n, const T* p) {
  return n % V == 0 && reinterpret_cast<uintptr_t>(p) % (sizeof(T) * V) == 0;
}
template <int V, class T, class... Rest>
bool fits(int64_t n, const T* p, const Rest*... rest) {
  return fits<V>(n, p) && fits<V>(n, rest...);
}

struct Extent {
  int64_t features, rows;
  int layers;  // of the grid: the directions, or steps
};

// F::run<V>(s, layer, row, feature) for all of them. Rows beyond the grid's limit of 65,535 blocks are looped
// over.
template <class F, int V, class S>
__global__ void __launch_bounds__(kThreads)
    for_each(const __grid_constant__ S s, const __grid_constant__ Extent n) {
  const int64_t feature = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (feature >= n.features) return;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < n.rows;
       row += stride) {
    F::template run<V>(s, static_cast<int>(blockIdx.z), row, feature);
  }
}

template <class F, int V, class S>
cudaError_t launch(const S& s, const Extent& n, cudaStream_t stream) {
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
