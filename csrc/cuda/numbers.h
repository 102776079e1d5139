// Numbers of the tensors' types: widened for sums, loaded and stored several at once, and activated.
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

// For results of at most 11 bits: 2e-7 of absolute error, as exp and the quotients are to a few ulp. Two
// instructions of the special function unit a gate, where Exact takes some twenty more.
class Fast {
 public:
  static FASTLSTM_HD float sigmoid(float x) { return logistic(-1.4426950408889634f * x); }
  static FASTLSTM_HD float tanh(float x) { return 2.0f * logistic(-2.8853900817779268f * x) - 1.0f; }

 private:
  // 1 / (1 + 2^x). Subnormal numbers are taken for 0, which the sum with 1 does anyway; __expf and __fdividef
  // each take four instructions more to avoid that.
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
