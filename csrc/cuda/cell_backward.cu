// Backward: the cell of one step, its projection, the gradient of h0, and rows for the weight gradients of
// ragged batches. The work of a thread is in step.h.
#include "cuda/launch.cuh"
#include "cuda/tuning.h"

namespace fastlstm::cuda {
namespace {

template <class T>
struct Backward {
  template <int V>
  static __device__ __forceinline__ void run(const BackwardStep<T>& s, int d, int64_t b, int64_t j) {
    backward_element<T, V>(s, d, b, j);
  }
};

template <class T>
struct NormBackward {
  template <int V>
  static __device__ __forceinline__ void run(const BackwardStep<T>& s, int d, int64_t b,
                                             const RowThread& thread) {
    norm_backward_row<T, V>(s, d, b, thread);
  }
};

template <class T>
struct ProjectedBackward {
  template <int V>
  static __device__ __forceinline__ void run(const ProjectedGradient<T>& s, int d, int64_t b, int64_t k) {
    projected_gradient_element<T, V>(s, d, b, k);
  }
};

template <class T>
struct Initial {
  template <int V>
  static __device__ __forceinline__ void run(const InitialGradient<T>& s, int d, int64_t b, int64_t k) {
    initial_gradient_element<T, V>(s, d, b, k);
  }
};

template <class T>
struct Ragged {
  template <int V>
  static __device__ __forceinline__ void run(const RaggedRows<T>& s, int first, int64_t b, int64_t k) {
#pragma unroll 1
    for (int64_t r = first; r < s.count; r += gridDim.z) ragged_row_element<T, V>(s, r, b, k);
  }
};

template <int V, class T>
bool can_vectorize_gradient(const HiddenGradient<T>& s) {
  return can_vectorize<V>(s.P, s.dh_n, s.dh, s.carry) &&
         (!s.dy || (can_vectorize<V>(s.dy_t, s.dy) && s.dy_b % V == 0)) &&
         can_vectorize<V, T>(s.recurrent_mask) && can_vectorize<V, T>(s.zoneout);
}

}  // namespace

template <class T>
cudaError_t launch_cell_step_bwd(const BackwardStep<T>& s, cudaStream_t stream) {
  constexpr int V = kVecFeatures<T>;
  const bool vectorized =
      can_vectorize<V>(s.H, s.dhidden, s.gates, s.cells, s.c0, s.dc_n, s.dc, s.dgates, s.hidden) &&
      (!s.dcells || (can_vectorize<V>(s.dcells_t, s.dcells) && s.dcells_b % V == 0)) &&
      can_vectorize<V, T>(s.zoneout) && (s.dhidden || can_vectorize_gradient<V>(s.gradient));
  const Extent extent = {s.H, s.steps.B, s.D};
  if (s.norm[0].gain_x) {
    return vectorized && can_vectorize<V>(s.H, s.dgates_x, s.norm_terms) &&
                   can_vectorize<V>(s.H, s.norm[0]) && can_vectorize<V>(s.H, s.norm[1])
               ? launch_rows<NormBackward<T>, V>(s, extent, stream)
               : launch_rows<NormBackward<T>, 1>(s, extent, stream);
  }
  return vectorized ? launch<Backward<T>, V>(s, extent, stream) : launch<Backward<T>, 1>(s, extent, stream);
}

template <class T>
cudaError_t launch_projection_step_bwd(const ProjectedGradient<T>& s, cudaStream_t stream) {
  constexpr int V = kVecFeatures<T>;
  const bool vectorized =
      can_vectorize_gradient<V>(s.gradient) && can_vectorize<V>(s.gradient.P, s.dprojected);
  const Extent extent = {s.gradient.P, s.steps.B, s.D};
  return vectorized ? launch<ProjectedBackward<T>, V>(s, extent, stream)
                    : launch<ProjectedBackward<T>, 1>(s, extent, stream);
}

template <class T>
cudaError_t launch_initial_state_bwd(const InitialGradient<T>& s, cudaStream_t stream) {
  constexpr int V = kVecFeatures<T>;
  const bool vectorized = can_vectorize_gradient<V>(s.gradient) && can_vectorize<V>(s.gradient.P, s.dh0);
  const Extent extent = {s.gradient.P, s.steps.B, s.D};
  return vectorized ? launch<Initial<T>, V>(s, extent, stream) : launch<Initial<T>, 1>(s, extent, stream);
}

template <class T>
cudaError_t launch_ragged_rows(const RaggedRows<T>& s, cudaStream_t stream) {
  constexpr int V = kVecFeatures<T>;
  const bool vectorized = can_vectorize<V>(s.n, s.initial, s.out) && can_vectorize<V>(s.source_t, s.source) &&
                          s.source_b % V == 0 && can_vectorize<V, T>(s.mask);
  const Extent extent = {s.n, s.steps.B,
                         static_cast<int>(s.count < kRaggedGridMaxSteps ? s.count : kRaggedGridMaxSteps)};
  return vectorized ? launch<Ragged<T>, V>(s, extent, stream) : launch<Ragged<T>, 1>(s, extent, stream);
}

#define INSTANTIATE(T)                                                                           \
  template cudaError_t launch_cell_step_bwd<T>(const BackwardStep<T>&, cudaStream_t);            \
  template cudaError_t launch_projection_step_bwd<T>(const ProjectedGradient<T>&, cudaStream_t); \
  template cudaError_t launch_initial_state_bwd<T>(const InitialGradient<T>&, cudaStream_t);     \
  template cudaError_t launch_ragged_rows<T>(const RaggedRows<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace fastlstm::cuda
