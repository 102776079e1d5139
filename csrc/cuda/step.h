// What one thread of each kernel in cell_kernels.h computes: V neighbouring features of one row.
//
// Host and device, and only plain memory accesses, so that the tests run the same code without a GPU
// (tests/test_cuda_host.py). The equations themselves are in cell.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>

#include "cell.h"
#include "cuda/cell_kernels.h"

namespace fastlstm::cuda {

FASTLSTM_HD float widen(float x) { return x; }
FASTLSTM_HD double widen(double x) { return x; }
FASTLSTM_HD float widen(__half x) { return __half2float(x); }
FASTLSTM_HD float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

FASTLSTM_HD void narrow(float x, float& out) { out = x; }
FASTLSTM_HD void narrow(double x, double& out) { out = x; }
FASTLSTM_HD void narrow(float x, __half& out) { out = __float2half_rn(x); }
FASTLSTM_HD void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

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

// What a launch covers.
struct Extent {
  int64_t features, rows;
  int layers;  // of the grid: the directions, or steps
};

// V numbers of type A in registers.
template <class A, int V>
struct Vec {
  A v[V];
};

template <class T, int V>
struct alignas(sizeof(T) * V) Packed {
  T v[V];
};

// One access for all V; the launcher chose V so that p is aligned to it.
template <int V, class T>
FASTLSTM_HD Vec<Acc<T>, V> load(const T* p) {
  const Packed<T, V> packed = *reinterpret_cast<const Packed<T, V>*>(p);
  Vec<Acc<T>, V> x;
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] = widen(packed.v[k]);
  return x;
}

template <int V, class T>
FASTLSTM_HD void store(T* p, const Vec<Acc<T>, V>& x) {
  Packed<T, V> packed;
#pragma unroll
  for (int k = 0; k < V; ++k) narrow(x.v[k], packed.v[k]);
  *reinterpret_cast<Packed<T, V>*>(p) = packed;
}

template <class A, int V>
FASTLSTM_HD Vec<A, V> zeros() {
  Vec<A, V> x;
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] = 0;
  return x;
}

template <int V, class T>
FASTLSTM_HD Vec<Acc<T>, V> load_or_zeros(const T* base, int64_t offset) {
  return base ? load<V>(base + offset) : zeros<Acc<T>, V>();
}

template <class A, int V>
FASTLSTM_HD void add(Vec<A, V>& x, const Vec<A, V>& y) {
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] += y.v[k];
}

// expf, tanhf, exp and tanh of CUDA: at most 2 ulp for every argument (CUDA C++ Programming Guide,
// Mathematical Functions).
template <class A>
struct Exact {
  static FASTLSTM_HD A sigmoid(A x) { return A(1) / (A(1) + exp(-x)); }
  static FASTLSTM_HD A tanh(A x) { return ::tanh(x); }
};
template <>
struct Exact<float> {
  static FASTLSTM_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  static FASTLSTM_HD float tanh(float x) { return tanhf(x); }
};

FASTLSTM_HD bool has_step(const Steps& s, int64_t t, int64_t b) { return !s.lengths || t < s.lengths[b]; }

// Whether direction d enters step t of row b with zero state. The reverse one does where step t + 1 begins a
// sequence.
FASTLSTM_HD bool enters_fresh(const Steps& s, int d, int64_t t, int64_t b) {
  const int64_t begins = t + d;
  return s.reset_mask && begins < s.T && has_step(s, begins, b) && s.reset_mask[begins * s.B + b];
}

// Whether direction d enters step t of row b with h0 and c0.
FASTLSTM_HD bool enters_initial(const Steps& s, int d, int64_t t, int64_t b) {
  return d == 0 ? t == 0 : t + 1 == (s.lengths ? s.lengths[b] : s.T);
}

FASTLSTM_HD int64_t step_before(int d, int64_t t) { return d == 0 ? t - 1 : t + 1; }
FASTLSTM_HD int64_t step_after(int d, int64_t t) { return d == 0 ? t + 1 : t - 1; }

// Takes in h_t, features k ... k + V - 1; a row that lacks the step keeps the h it has.
template <class T, int V>
FASTLSTM_HD void put_h(const Steps& steps, const HiddenState<T>& s, int D, bool first, int d, int64_t t,
                       int64_t b, int64_t k, Vec<Acc<T>, V> h) {
  const int64_t at = (d * steps.B + b) * s.P + k;
  const bool valid = has_step(steps, t, b);
  if (!valid) h = first ? load_or_zeros<V>(s.h0, at) : load<V>(s.h + at);
  store<V>(s.y + ((t * steps.B + b) * D + d) * s.P + k, valid ? h : zeros<Acc<T>, V>());
  if (s.h_n) {
    store<V>(s.h_n + at, h);
  } else {
    // The next product reads h as it stands, so a reset is applied where h is written.
    store<V>(s.h + at, enters_fresh(steps, d, step_after(d, t), b) ? zeros<Acc<T>, V>() : h);
  }
}

template <class T, int V>
FASTLSTM_HD void forward_element(const ForwardStep<T>& s, int d, int64_t b, int64_t j) {
  using A = Acc<T>;
  const int64_t B = s.steps.B, H = s.H, t = s.t[d];
  const int64_t at = (d * B + b) * H + j;                         // in [D, B, H]
  const int64_t row = ((d * s.steps.T + t) * B + b) * 4 * H + j;  // in [D, T, B, 4H]
  T* const cells = s.cells ? s.cells + ((t * B + b) * s.D + d) * H + j : nullptr;
  Vec<A, V> c = s.first ? load_or_zeros<V>(s.c0, at) : load<V>(s.c + at);
  Vec<A, V> h = zeros<A, V>();

  if (!has_step(s.steps, t, b)) {
    if (cells) store<V>(cells, h);
    if (s.gates) {
#pragma unroll
      for (int g = 0; g < 4; ++g) store<V>(s.gates + row + g * H, h);
    }
  } else {
    if (enters_fresh(s.steps, d, t, b)) c = zeros<A, V>();
    const A* gates_x = s.gates_x + ((d * s.slots + s.slot[d]) * B + b) * 4 * H + j;
    Vec<A, V> a[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      a[g] = load<V>(gates_x + g * H);
      if (s.bias_ih[d]) add(a[g], load<V>(s.bias_ih[d] + g * H + j));
      if (s.bias_hh[d]) add(a[g], load<V>(s.bias_hh[d] + g * H + j));
      if (s.gates_h) add(a[g], load<V>(s.gates_h + (d * B + b) * 4 * H + g * H + j));
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Gates<A> gates = activate<Exact<A>>(Gates<A>{a[0].v[k], a[1].v[k], a[2].v[k], a[3].v[k]});
      c.v[k] = next_c(gates, c.v[k]);
      h.v[k] = gates.o * Exact<A>::tanh(c.v[k]);
      a[0].v[k] = gates.i, a[1].v[k] = gates.f, a[2].v[k] = gates.g, a[3].v[k] = gates.o;
    }
    if (cells) store<V>(cells, c);
    if (s.gates) {
#pragma unroll
      for (int g = 0; g < 4; ++g) store<V>(s.gates + row + g * H, a[g]);
    }
  }
  if (s.c_n) {
    store<V>(s.c_n + at, c);
  } else {
    store<V>(s.c + at, c);
  }
  if (s.hidden) {
    store<V>(s.hidden + at, h);
  } else {
    put_h<T, V>(s.steps, s.state, s.D, s.first, d, t, b, j, h);
  }
}

template <class T, int V>
FASTLSTM_HD void projected_element(const ProjectedStep<T>& s, int d, int64_t b, int64_t k) {
  const Vec<Acc<T>, V> h = load<V>(s.projected + (d * s.steps.B + b) * s.state.P + k);
  put_h<T, V>(s.steps, s.state, s.D, s.first, d, s.t[d], b, k, h);
}

// The gradient that reaches the h which step t leaves behind, h_n included and y not.
template <class T, int V>
FASTLSTM_HD Vec<Acc<T>, V> carried_dh(const Steps& steps, const HiddenGradient<T>& s, bool first, int d,
                                      int64_t t, int64_t b, int64_t k) {
  const int64_t at = (d * steps.B + b) * s.P + k, done = step_after(d, t);
  if (first) return load_or_zeros<V>(s.dh_n, at);
  if (!has_step(steps, done, b)) return load<V>(s.carry + at);
  if (enters_fresh(steps, d, done, b)) return zeros<Acc<T>, V>();
  return load<V>(s.dh + at);
}

// The whole gradient of h_t; zero for a row that lacks the step, whose gradient is put aside.
template <class T, int V>
FASTLSTM_HD Vec<Acc<T>, V> take_dh(const Steps& steps, const HiddenGradient<T>& s, int D, bool first, int d,
                                   int64_t t, int64_t b, int64_t k) {
  Vec<Acc<T>, V> dh = carried_dh<T, V>(steps, s, first, d, t, b, k);
  if (!has_step(steps, t, b)) {
    store<V>(s.carry + (d * steps.B + b) * s.P + k, dh);
    return zeros<Acc<T>, V>();
  }
  if (s.dy) add(dh, load<V>(s.dy + t * s.dy_t + b * s.dy_b + d * s.P + k));
  return dh;
}

template <class T, int V>
FASTLSTM_HD void backward_element(const BackwardStep<T>& s, int d, int64_t b, int64_t j) {
  using A = Acc<T>;
  const int64_t B = s.steps.B, H = s.H, t = s.t[d];
  const int64_t at = (d * B + b) * H + j;
  const int64_t slot = (d * s.slots + s.slot[d]) * B + b;
  T* const dgates = s.dgates + slot * 4 * H + j;
  const Vec<A, V> dh =
      s.dhidden ? load<V>(s.dhidden + at) : take_dh<T, V>(s.steps, s.gradient, s.D, s.first, d, t, b, j);
  Vec<A, V> dc = s.first ? load_or_zeros<V>(s.dc_n, at) : load<V>(s.dc + at);

  if (!has_step(s.steps, t, b)) {
#pragma unroll
    for (int g = 0; g < 4; ++g) store<V>(dgates + g * H, zeros<A, V>());
    if (s.hidden) store<V>(s.hidden + slot * H + j, zeros<A, V>());
    store<V>(s.dc + at, dc);
    return;
  }
  if (s.dcells) add(dc, load<V>(s.dcells + t * s.dcells_t + b * s.dcells_b + d * H + j));
  const T* gates = s.gates + ((d * s.steps.T + t) * B + b) * 4 * H + j;
  Vec<A, V> a[4];
#pragma unroll
  for (int g = 0; g < 4; ++g) a[g] = load<V>(gates + g * H);
  Vec<A, V> c = load<V>(s.cells + ((t * B + b) * s.D + d) * H + j);
  const bool fresh = enters_fresh(s.steps, d, t, b);
  Vec<A, V> c_prev = zeros<A, V>();
  if (!fresh) {
    c_prev = enters_initial(s.steps, d, t, b)
                 ? load_or_zeros<V>(s.c0, at)
                 : load<V>(s.cells + ((step_before(d, t) * B + b) * s.D + d) * H + j);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const Gates<A> gate = {a[0].v[k], a[1].v[k], a[2].v[k], a[3].v[k]};
    const A tanh_c = Exact<A>::tanh(c.v[k]);
    const Gates<A> pre = cell_backward(gate, c_prev.v[k], tanh_c, dh.v[k], dc.v[k]);
    a[0].v[k] = pre.i, a[1].v[k] = pre.f, a[2].v[k] = pre.g, a[3].v[k] = pre.o;
    c.v[k] = gate.o * tanh_c;
  }
#pragma unroll
  for (int g = 0; g < 4; ++g) store<V>(dgates + g * H, a[g]);
  if (s.hidden) store<V>(s.hidden + slot * H + j, c);
  store<V>(s.dc + at, fresh ? zeros<A, V>() : dc);
}

template <class T, int V>
FASTLSTM_HD void projected_gradient_element(const ProjectedGradient<T>& s, int d, int64_t b, int64_t k) {
  const Vec<Acc<T>, V> dh = take_dh<T, V>(s.steps, s.gradient, s.D, s.first, d, s.t[d], b, k);
  store<V>(s.dprojected + ((d * s.slots + s.slot[d]) * s.steps.B + b) * s.gradient.P + k, dh);
}

template <class T, int V>
FASTLSTM_HD void initial_gradient_element(const InitialGradient<T>& s, int d, int64_t b, int64_t k) {
  const int64_t beyond = d == 0 ? -1 : s.steps.T;  // the step that would leave h0 behind
  const Vec<Acc<T>, V> dh = carried_dh<T, V>(s.steps, s.gradient, false, d, beyond, b, k);
  store<V>(s.dh0 + (d * s.steps.B + b) * s.gradient.P + k, dh);
}

// `r` counts the steps of out.
template <class T, int V>
FASTLSTM_HD void ragged_row_element(const RaggedRows<T>& s, int64_t r, int64_t b, int64_t k) {
  const int64_t t = s.begin + r;
  Vec<Acc<T>, V> x = zeros<Acc<T>, V>();
  if (has_step(s.steps, t, b)) {
    if (!s.entering) {
      x = load<V>(s.source + t * s.source_t + b * s.source_b + k);
    } else if (enters_fresh(s.steps, s.d, t, b)) {
      // stays zero
    } else if (enters_initial(s.steps, s.d, t, b)) {
      x = load_or_zeros<V>(s.initial, b * s.n + k);
    } else {
      x = load<V>(s.source + step_before(s.d, t) * s.source_t + b * s.source_b + k);
    }
  }
  store<V>(s.out + (r * s.steps.B + b) * s.n + k, x);
}

}  // namespace fastlstm::cuda
