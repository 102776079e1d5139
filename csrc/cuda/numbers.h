// Conversions to and from the accumulation dtype, vector loads and stores, and activations.
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

// Features per thread if sizes and addresses allow: 16-byte accesses of the accumulation dtype.
template <class T>
constexpr int kVecFeatures = 16 / sizeof(Acc<T>);

// Returns true if rows of n elements can be accessed as vectors of V at p, or p is null.
template <int V, class T>
bool can_vectorize(int64_t n, const T* p) {
  return n % V == 0 && reinterpret_cast<uintptr_t>(p) % (sizeof(T) * V) == 0;
}
template <int V, class T, class... Rest>
bool can_vectorize(int64_t n, const T* p, const Rest*... rest) {
  return can_vectorize<V>(n, p) && can_vectorize<V>(n, rest...);
}

// The same for a mask's rows.
template <int V, class T>
bool can_vectorize(const Mask& m) {
  const size_t bytes = m.flags ? sizeof(bool) : sizeof(T);
  bool fits = reinterpret_cast<uintptr_t>(m.values) % (bytes * V) == 0;
  for (const int64_t stride : m.strides) fits = fits && stride % V == 0;
  return fits;
}

// The same for the weights of layer normalization of n units.
template <int V, class T>
bool can_vectorize(int64_t n, const NormWeights<T>& w) {
  return can_vectorize<V>(n, w.gain_x, w.bias_x, w.gain_h, w.bias_h, w.gain_c, w.bias_c);
}

// The index space of a launch.
struct Extent {
  int64_t features, rows;
  int layers;  // directions, or steps
};

// V numbers of type A in registers.
template <class A, int V>
struct VecN {
  A v[V];
};

template <class T, int V>
struct alignas(sizeof(T) * V) AlignedVecN {
  T v[V];
};

// One access for all V; the launcher selects V such that p is aligned.
template <int V, class T>
FASTLSTM_HD VecN<Acc<T>, V> load(const T* p) {
  const AlignedVecN<T, V> packed = *reinterpret_cast<const AlignedVecN<T, V>*>(p);
  VecN<Acc<T>, V> x;
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] = widen(packed.v[k]);
  return x;
}

template <int V, class T>
FASTLSTM_HD void store(T* p, const VecN<Acc<T>, V>& x) {
  AlignedVecN<T, V> packed;
#pragma unroll
  for (int k = 0; k < V; ++k) narrow(x.v[k], packed.v[k]);
  *reinterpret_cast<AlignedVecN<T, V>*>(p) = packed;
}

template <class A, int V>
FASTLSTM_HD VecN<A, V> zeros() {
  VecN<A, V> x;
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] = 0;
  return x;
}

template <int V, class T>
FASTLSTM_HD VecN<Acc<T>, V> load_or_zeros(const T* base, int64_t offset) {
  return base ? load<V>(base + offset) : zeros<Acc<T>, V>();
}

template <class A, int V>
FASTLSTM_HD void add(VecN<A, V>& x, const VecN<A, V>& y) {
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] += y.v[k];
}

// x becomes x * y, and x - y.
template <class A, int V>
FASTLSTM_HD void scale(VecN<A, V>& x, const VecN<A, V>& y) {
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] *= y.v[k];
}
template <class A, int V>
FASTLSTM_HD void subtract(VecN<A, V>& x, const VecN<A, V>& y) {
#pragma unroll
  for (int k = 0; k < V; ++k) x.v[k] -= y.v[k];
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

// For results of at most 11 bits: absolute error 2e-7. Two instructions of the special function unit per
// gate, about twenty fewer than Exact.
class Fast {
 public:
  static FASTLSTM_HD float sigmoid(float x) { return logistic(-1.4426950408889634f * x); }
  static FASTLSTM_HD float tanh(float x) { return 2.0f * logistic(-2.8853900817779268f * x) - 1.0f; }

 private:
  // 1 / (1 + 2^x). Flushes subnormal numbers, which the sum with 1 rounds away anyway; __expf and __fdividef
  // each take four more instructions to keep them.
  static FASTLSTM_HD float logistic(float x) {
#if defined(__CUDA_ARCH__)
    float power, quotient;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(quotient) : "f"(1.0f + power));
    return quotient;
#else
    return 1.0f / (1.0f + exp2f(x));
#endif
  }
};

}  // namespace fastlstm::cuda
