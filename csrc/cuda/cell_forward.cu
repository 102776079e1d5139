// Forward: the cell of one step, and with projection the storing of the projected h. The work of a thread is
// in step.h.
#include "cuda/launch.cuh"

namespace fastlstm::cuda {
namespace {

template <class T>
struct Forward {
  template <int V>
  static __device__ __forceinline__ void run(const ForwardStep<T>& s, int d, int64_t b, int64_t j) {
    forward_element<T, V>(s, d, b, j);
  }
};

template <class T>
struct NormForward {
  template <int V>
  static __device__ __forceinline__ void run(const ForwardStep<T>& s, int d, int64_t b,
                                             const RowThread& thread) {
    norm_forward_row<T, V>(s, d, b, thread);
  }
};

template <class T>
struct ProjectedForward {
  template <int V>
  static __device__ __forceinline__ void run(const ProjectedStep<T>& s, int d, int64_t b, int64_t k) {
    projected_element<T, V>(s, d, b, k);
  }
};

template <int V, class T>
bool can_vectorize_state(const HiddenState<T>& s) {
  return can_vectorize<V>(s.P, s.h0, s.h, s.y, s.h_n, s.unmasked) && can_vectorize<V, T>(s.recurrent_mask) &&
         can_vectorize<V, T>(s.zoneout);
}

}  // namespace

template <class T>
cudaError_t launch_cell_step_fwd(const ForwardStep<T>& s, cudaStream_t stream) {
  constexpr int V = kVecFeatures<T>;
  const bool vectorized =
      can_vectorize<V>(s.H, s.gates_x, s.gates_h, s.bias_ih[0], s.bias_ih[1], s.bias_hh[0], s.bias_hh[1]) &&
      can_vectorize<V>(s.H, s.c0, s.c, s.c_n, s.cells, s.gates, s.hidden) && can_vectorize<V, T>(s.zoneout) &&
      (s.hidden || can_vectorize_state<V>(s.state));
  const Extent extent = {s.H, s.steps.B, s.D};
  if (s.norm[0].gain_x) {
    return vectorized && can_vectorize<V>(s.H, s.norm[0]) && can_vectorize<V>(s.H, s.norm[1])
               ? launch_rows<NormForward<T>, V>(s, extent, stream)
               : launch_rows<NormForward<T>, 1>(s, extent, stream);
  }
  return vectorized ? launch<Forward<T>, V>(s, extent, stream) : launch<Forward<T>, 1>(s, extent, stream);
}

template <class T>
cudaError_t launch_projection_step_fwd(const ProjectedStep<T>& s, cudaStream_t stream) {
  constexpr int V = kVecFeatures<T>;
  const Extent extent = {s.state.P, s.steps.B, s.D};
  return can_vectorize<V>(s.state.P, s.projected) && can_vectorize_state<V>(s.state)
             ? launch<ProjectedForward<T>, V>(s, extent, stream)
             : launch<ProjectedForward<T>, 1>(s, extent, stream);
}

#define INSTANTIATE(T)                                                               \
  template cudaError_t launch_cell_step_fwd<T>(const ForwardStep<T>&, cudaStream_t); \
  template cudaError_t launch_projection_step_fwd<T>(const ProjectedStep<T>&, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(__half)
INSTANTIATE(__nv_bfloat16)
#undef INSTANTIATE

}  // namespace fastlstm::cuda
