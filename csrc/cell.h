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

// The state after a step, of which zoneout keeps `share` as it was before (Krueger et al. 2017).
template <class V>
FASTLSTM_HD V zoned(V share, V before, V after) {
  return share * before + (1 - share) * after;
}

constexpr double kNormEpsilon = 1e-5;  // torch.nn.LayerNorm's

// Layer normalization of a row v (Ba et al. 2016, "Layer Normalization"): LN(v) = standard(v) * gain + bias.
template <class V>
struct Moments {
  V mean, scale;  // scale: 1 / sqrt(variance + kNormEpsilon)

  FASTLSTM_HD V standard(V v) const { return (v - mean) * scale; }
  // dv, from g = dLN * gain, s = standard(v), and the row's means of g and g * s.
  FASTLSTM_HD V gradient(V g, V s, V mean_g, V mean_gs) const { return scale * (g - mean_g - s * mean_gs); }
};

// The terms of the gradients of a direction's layer normalization, [14H], of which the weights' gradients are
// the sums over all rows: where each begins, in units of H. Those of the biases are gradients of the
// pre-activations: one for the biases of W_ih x, of W_hh h and of the gates.
struct NormTerms {
  static constexpr int kBiases = 0, kGainX = 4, kGainH = 8, kGainC = 12, kBiasC = 13, kSize = 14;
  // Of the k-th weight in the order of the contract (fastlstm/ops/schema.py).
  static constexpr int of_weight(int64_t k) {
    constexpr int begin[] = {kGainX, kBiases, kGainH, kBiases, kGainC, kBiasC};
    return begin[k];
  }
};

// All of a step's backward that does not depend on dh and dc.
template <class V>
struct CellDerivatives {
  Gates<V> pre;  // of the pre-activations: times the gradient of c_t, for the output gate times that of h_t
  V c, c_prev;   // dc_t / dh_t and dc_t / dc_{t-1}
};

template <class V>
FASTLSTM_HD CellDerivatives<V> cell_derivatives(const Gates<V>& a, V c_prev, V tanh_c) {
  return {{a.g * (a.i * (1 - a.i)), c_prev * (a.f * (1 - a.f)), a.i * (1 - a.g * a.g),
           tanh_c * (a.o * (1 - a.o))},
          a.o * (1 - tanh_c * tanh_c),
          a.f};
}

// From dh, the gradient of h_t (before any projection), and dc, that of c_t: the gradients of the
// pre-activations. dc becomes the gradient of c_{t-1}.
template <class V>
FASTLSTM_HD Gates<V> gate_gradients(const CellDerivatives<V>& d, V dh, V& dc) {
  const Gates<V> pre = {dc * d.pre.i, dc * d.pre.f, dc * d.pre.g, dh * d.pre.o};
  dc = dc * d.c_prev;
  return pre;
}
// The same where dc is the gradient of c_t by every way but h_t.
template <class V>
FASTLSTM_HD Gates<V> cell_backward(const CellDerivatives<V>& d, V dh, V& dc) {
  dc = dc + dh * d.c;
  return gate_gradients(d, dh, dc);
}
template <class V>
FASTLSTM_HD Gates<V> cell_backward(const Gates<V>& a, V c_prev, V tanh_c, V dh, V& dc) {
  return cell_backward(cell_derivatives(a, c_prev, tanh_c), dh, dc);
}

}  // namespace fastlstm
