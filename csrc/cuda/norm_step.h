// The cell kernels of layers with layer normalization: the work of one thread of the CTA that has a row.
//
// Normalization needs sums over a row's features, of W_ih x, of W_hh h and of c, so a CTA has a whole row,
// and passes over it as often as sums depend on earlier ones. In every pass over H units a thread has the
// same ones, so that it reads back only what it has written itself. On the host a row has one thread.
#pragma once

#include "cuda/step.h"

namespace fastlstm::cuda {

constexpr int kRowThreads = 128;  // of a CTA

struct RowThread {
  int index, count;

  // Calls f(j) for the first of each V features of a row of n that are this thread's.
  template <int V, class F>
  FASTLSTM_HD void for_features(int64_t n, F f) const {
    for (int64_t j = int64_t{index} * V; j < n; j += int64_t{count} * V) f(j);
  }
};

// Replaces N numbers of each thread by their sums over the CTA's threads, in a fixed order.
template <class A, int N>
FASTLSTM_HD void sum_over_row(A (&x)[N]) {
#if defined(__CUDA_ARCH__)
  __shared__ A sums[kRowThreads / 32][N];
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x[n] += __shfl_xor_sync(0xffffffffu, x[n], lanes);
  __syncthreads();  // the previous sums have been read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) sums[threadIdx.x / 32][n] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = 0;
#pragma unroll
    for (int w = 0; w < kRowThreads / 32; ++w) x[n] += sums[w][n];
  }
#else
  (void)x;
#endif
}

// Of a row of n features; load(j) gives V of them. The mean first: a sum of squares would cancel.
template <class A, int V, class F>
FASTLSTM_HD Moments<A> row_moments(const RowThread& thread, int64_t n, F load) {
  A sum[1] = {0}, squares[1] = {0};
  thread.for_features<V>(n, [&](int64_t j) {
    const VecN<A, V> x = load(j);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[0] += x.v[k];
  });
  sum_over_row(sum);
  const A mean = sum[0] / static_cast<A>(n);
  thread.for_features<V>(n, [&](int64_t j) {
    const VecN<A, V> x = load(j);
#pragma unroll
    for (int k = 0; k < V; ++k) squares[0] += (x.v[k] - mean) * (x.v[k] - mean);
  });
  sum_over_row(squares);
  return {mean, A(1) / static_cast<A>(sqrt(squares[0] / static_cast<A>(n) + static_cast<A>(kNormEpsilon)))};
}

// x becomes LN(x), with the gain and bias of its features.
template <class T, int V>
FASTLSTM_HD void normalize(VecN<Acc<T>, V>& x, const Moments<Acc<T>>& m, const T* gain, const T* bias) {
  const VecN<Acc<T>, V> g = load<V>(gain), b = load<V>(bias);
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] = m.standard(x.v[k]) * g.v[k] + b.v[k];
}

template <class T, int V>
FASTLSTM_HD void norm_forward_row(const ForwardStep<T>& s, int d, int64_t b, const RowThread& thread) {
  using A = Acc<T>;
  const StepCoord m = {s.t[d], s.slot[d], s.first, s.c_n != nullptr};
  const NormWeights<T>& w = s.norm[d];
  const int64_t B = s.steps.B, H = s.H;
  const A* const of_x = s.gates_x + ((d * s.slots + m.slot) * B + b) * 4 * H;
  A* const of_h = s.gates_h + (d * B + b) * 4 * H;  // W_hh h, then the activated gates
  T* const saved = s.gates ? s.gates + reserve_row(s, d, m.t, b) + 4 * H : nullptr;
  if (!has_step(s.steps, m.t, b)) {
    thread.for_features<V>(H, [&](int64_t j) {
      ForwardInput<A, V> in = forward_input<T, V>(s, m, d, b, j);
      store_forward<T, V>(s, m, d, b, j, false, in.c, in.c, zeros<A, V>(), in.gates);
#pragma unroll
      for (int g = 0; g < 8; ++g)
        if (saved) store<V>(saved + g * H + j, zeros<A, V>());
    });
    return;
  }
  const Moments<A> x = row_moments<A, V>(thread, 4 * H, [&](int64_t j) { return load<V>(of_x + j); });
  const Moments<A> h = row_moments<A, V>(thread, 4 * H, [&](int64_t j) { return load<V>(of_h + j); });
  thread.for_features<V>(H, [&](int64_t j) {
    VecN<A, V> a[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * H + j;
      a[g] = load<V>(of_x + at);
      VecN<A, V> from_h = load<V>(of_h + at);
      if (saved) store<V>(saved + at, a[g]), store<V>(saved + 4 * H + at, from_h);
      normalize<T, V>(a[g], x, w.gain_x + at, w.bias_x + at);
      normalize<T, V>(from_h, h, w.gain_h + at, w.bias_h + at);
      add(a[g], from_h);
      add_biases<T, V>(s, d, g, j, a[g]);
    }
    activate_gates(a);
#pragma unroll
    for (int g = 0; g < 4; ++g) store<V>(of_h + g * H + j, a[g]);
  });
  const auto load_gates = [&](int64_t j, VecN<A, V>(&a)[4]) {
#pragma unroll
    for (int g = 0; g < 4; ++g) a[g] = load<V>(of_h + g * H + j);
  };
  const Moments<A> of_c = row_moments<A, V>(thread, H, [&](int64_t j) {
    VecN<A, V> a[4];
    load_gates(j, a);
    return next_c_of(a, previous_c<T, V>(s, m, d, b, j));
  });
  thread.for_features<V>(H, [&](int64_t j) {
    VecN<A, V> a[4];
    load_gates(j, a);
    const VecN<A, V> c_prev = previous_c<T, V>(s, m, d, b, j), c = next_c_of(a, c_prev);
    VecN<A, V> normalized = c;
    normalize<T, V>(normalized, of_c, w.gain_c + j, w.bias_c + j);
    store_forward<T, V>(s, m, d, b, j, true, c_prev, c, hidden_of(a, normalized), a);
  });
}

template <class T, int V>
FASTLSTM_HD void norm_backward_row(const BackwardStep<T>& s, int d, int64_t b, const RowThread& thread) {
  using A = Acc<T>;
  const StepCoord m = {s.t[d], s.slot[d], s.first, false};
  const NormWeights<T>& w = s.norm[d];
  const int64_t B = s.steps.B, H = s.H, row = (d * s.slots + m.slot) * B + b;
  A* const terms = s.norm_terms + row * NormTerms::kSize * H;
  T *const of_x = s.dgates_x + row * 4 * H, *const of_h = s.dgates + row * 4 * H;
  const auto input = [&](int64_t j) { return backward_input<T, V>(s, m, d, b, j); };
  if (!has_step(s.steps, m.t, b)) {
    thread.for_features<V>(H, [&](int64_t j) {
      const BackwardInput<A, V> in = input(j);
      backward_dh<T, V>(s, m, d, b, j, in.dy);  // carries it past the step
      store_state_gradient<T, V>(s, m, d, b, j, in);
#pragma unroll
      for (int g = 0; g < NormTerms::kSize; ++g) store<V>(terms + g * H + j, zeros<A, V>());
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        store<V>(of_x + g * H + j, zeros<A, V>());
        store<V>(of_h + g * H + j, zeros<A, V>());
      }
    });
    return;
  }
  const T* const saved_x = s.gates + reserve_row(s, d, m.t, b) + 4 * H;
  const T* const saved_h = saved_x + 4 * H;
  const Moments<A> x = row_moments<A, V>(thread, 4 * H, [&](int64_t j) { return load<V>(saved_x + j); });
  const Moments<A> h = row_moments<A, V>(thread, 4 * H, [&](int64_t j) { return load<V>(saved_h + j); });
  const Moments<A> c = row_moments<A, V>(thread, H, [&](int64_t j) { return input(j).c; });

  // dh waits in the place of the first gate's gradient, those of LN(c) in their own.
  A c_means[2] = {0, 0};
  thread.for_features<V>(H, [&](int64_t j) {
    const BackwardInput<A, V> in = input(j);
    const VecN<A, V> dh = backward_dh<T, V>(s, m, d, b, j, in.dy), gain = load<V>(w.gain_c + j);
    VecN<A, V> normalized = in.c, dnormalized, by_standard;
    normalize<T, V>(normalized, c, w.gain_c + j, w.bias_c + j);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A standard = c.standard(in.c.v[k]);
      dnormalized.v[k] =
          dh.v[k] * cell_derivatives(gates_of(in.a, k), in.c_prev.v[k], Exact<A>::tanh(normalized.v[k])).c;
      by_standard.v[k] = dnormalized.v[k] * standard;
      c_means[0] += dnormalized.v[k] * gain.v[k];
      c_means[1] += by_standard.v[k] * gain.v[k];
    }
    store<V>(terms + j, dh);
    store<V>(terms + NormTerms::kBiasC * H + j, dnormalized);
    store<V>(terms + NormTerms::kGainC * H + j, by_standard);
  });
  sum_over_row(c_means);

  A means[4] = {0, 0, 0, 0};  // of the gradients of W_ih x and W_hh h, each also times its standard form
  thread.for_features<V>(H, [&](int64_t j) {
    BackwardInput<A, V> in = input(j);
    const VecN<A, V> dh = load<V>(terms + j), dnormalized = load<V>(terms + NormTerms::kBiasC * H + j),
                     gain = load<V>(w.gain_c + j);
    VecN<A, V> normalized = in.c;
    normalize<T, V>(normalized, c, w.gain_c + j, w.bias_c + j);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A tanh_c = Exact<A>::tanh(normalized.v[k]);
      const Gates<A> gate = gates_of(in.a, k);
      A dc = in.dc.v[k] + c.gradient(dnormalized.v[k] * gain.v[k], c.standard(in.c.v[k]),
                                     c_means[0] / static_cast<A>(H), c_means[1] / static_cast<A>(H));
      set_gates(in.a, k, gate_gradients(cell_derivatives(gate, in.c_prev.v[k], tanh_c), dh.v[k], dc));
      in.dc.v[k] = dc, in.c.v[k] = gate.o * tanh_c;
    }
    finish_dc(s.steps, d, m.t, b, in);
    store_state_gradient<T, V>(s, m, d, b, j, in);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * H + j;
      const VecN<A, V> gain_x = load<V>(w.gain_x + at), gain_h = load<V>(w.gain_h + at);
      VecN<A, V> by_x = load<V>(saved_x + at), by_h = load<V>(saved_h + at);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        by_x.v[k] = in.a[g].v[k] * x.standard(by_x.v[k]), by_h.v[k] = in.a[g].v[k] * h.standard(by_h.v[k]);
        means[0] += in.a[g].v[k] * gain_x.v[k], means[1] += by_x.v[k] * gain_x.v[k];
        means[2] += in.a[g].v[k] * gain_h.v[k], means[3] += by_h.v[k] * gain_h.v[k];
      }
      store<V>(terms + NormTerms::kBiases * H + at, in.a[g]);
      store<V>(terms + NormTerms::kGainX * H + at, by_x);
      store<V>(terms + NormTerms::kGainH * H + at, by_h);
    }
  });
  sum_over_row(means);
#pragma unroll
  for (A& mean : means) mean /= static_cast<A>(4 * H);

  thread.for_features<V>(H, [&](int64_t j) {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * H + j;
      const VecN<A, V> da = load<V>(terms + NormTerms::kBiases * H + at), gain_x = load<V>(w.gain_x + at),
                       gain_h = load<V>(w.gain_h + at);
      VecN<A, V> dx = load<V>(saved_x + at), dh = load<V>(saved_h + at);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        dx.v[k] = x.gradient(da.v[k] * gain_x.v[k], x.standard(dx.v[k]), means[0], means[1]);
        dh.v[k] = h.gradient(da.v[k] * gain_h.v[k], h.standard(dh.v[k]), means[2], means[3]);
      }
      store<V>(of_x + at, dx);
      store<V>(of_h + at, dh);
    }
  });
}

}  // namespace fastlstm::cuda
