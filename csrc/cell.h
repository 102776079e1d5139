// The equations of the LSTM cell, once for host and device: no torch header, no memory access.
//
// Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000, in torch.nn.LSTM's conventions:
//   c_t = f * c_{t-1} + i * g          h_t = o * tanh(c_t)
//   i, f, o = sigmoid and g = tanh of their pre-activations.
// V is a scalar or a vector of one element per hidden unit. A gives A::sigmoid(V) and A::tanh(V).
#pragma once

#if defined(__CUDACC__)
#define FASTLSTM_HD __host__ __device__ __forceinline__
#else
#define FASTLSTM_HD inline __attribute__((always_inline))
#endif

namespace fastlstm {

// The four gates of one unit (or a vector of units), in the order torch.nn.LSTM stores them.
template <class V>
struct Gates {
  V i, f, g, o;
};

template <class A, class V>
FASTLSTM_HD Gates<V> activate(const Gates<V>& pre) {
  return {A::sigmoid(pre.i), A::sigmoid(pre.f), A::tanh(pre.g), A::sigmoid(pre.o)};
}

// c_t from the activated gates; h_t = o * tanh(c_t) is the caller's.
template <class V>
FASTLSTM_HD V next_c(const Gates<V>& a, V c_prev) {
  return a.f * c_prev + a.i * a.g;
}

// From dh, the gradient of h_t (before any projection), and dc, that of c_t by every other way: the gradients
// of the pre-activations. dc becomes the gradient of c_{t-1}.
template <class V>
FASTLSTM_HD Gates<V> cell_backward(const Gates<V>& a, V c_prev, V tanh_c, V dh, V& dc) {
  // dh and dc come last: all else is known before they are.
  dc = dc + dh * (a.o * (1 - tanh_c * tanh_c));
  const Gates<V> pre = {dc * (a.g * (a.i * (1 - a.i))), dc * (c_prev * (a.f * (1 - a.f))),
                        dc * (a.i * (1 - a.g * a.g)), dh * (tanh_c * (a.o * (1 - a.o)))};
  dc = dc * a.f;
  return pre;
}

}  // namespace fastlstm
