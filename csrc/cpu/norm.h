// Layer normalization of a row v [n]; the equations are in cell.h.
#pragma once

#include "cpu/vec.h"

namespace fastlstm::FASTLSTM_ISA {

// Calls f(k, n) for the vectors of n elements from k on that make up `count` elements: n is kWidth<T> but in
// the last.
template <class T, class F>
FASTLSTM_INLINE void for_vectors(int64_t count, F&& f) {
  constexpr int W = kWidth<T>;
  int64_t k = 0;
  for (; k + W <= count; k += W) f(k, W);
  if (k < count) f(k, static_cast<int>(count - k));
}
template <class T>
FASTLSTM_INLINE Vec<T> load_first(const T* p, int n) {
  return n == kWidth<T> ? load(p) : load_part(p, n);
}
template <class T>
FASTLSTM_INLINE void store_first(T* p, Vec<T> v, int n) {
  n == kWidth<T> ? store(p, v) : store_part(p, v, n);
}
// v with zeros after its first n elements.
template <class T>
FASTLSTM_INLINE Vec<T> keep_first(Vec<T> v, int n) {
  if (n == kWidth<T>) return v;
  Real<T> elements[kWidth<T>];
  store(elements, v);
  return load_part(elements, n);
}

// The sum of v's elements, in each of them.
template <class T, int d = kWidth<T> / 2>
FASTLSTM_INLINE Vec<T> sum_elements(Vec<T> v) {
  if constexpr (d == 0) {
    return v;
  } else {
    Vec<T> a = v, b = v;
    swap_blocks<T, d>(a, b, std::make_index_sequence<kWidth<T>>());
    return sum_elements<T, d / 2>(a + b);
  }
}
// The sum of f(k, n), vectors of n elements and zeros, over `count` elements, in each element.
template <class T, class F>
FASTLSTM_INLINE Vec<T> sum_vectors_of(int64_t count, F&& f) {
  constexpr int64_t W = kWidth<T>;
  Vec<T> part[4] = {};  // since each addition waits for the one before
  int64_t k = 0;
  for (; k + 4 * W <= count; k += 4 * W)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) part[q] += f(k + q * W, static_cast<int>(W));
  for_vectors<T>(count - k, [&](int64_t more, int n) { part[more / W % 4] += f(k + more, n); });
  return sum_elements<T>((part[0] + part[1]) + (part[2] + part[3]));
}

// Of a row, in each element.
template <class T>
using Moments = fastlstm::Moments<Vec<T>>;

FASTLSTM_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTLSTM_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Of a row of numbers stored as E, T or Real<T>. The mean first: a sum of squares would cancel.
template <class T, class E>
FASTLSTM_INLINE Moments<T> moments(const E* v, int64_t n) {
  using R = Real<T>;
  const Vec<T> mean = sum_vectors_of<T>(n, [&](int64_t k, int m) { return load_first(v + k, m); }) / R(n);
  const Vec<T> squares = sum_vectors_of<T>(n, [&](int64_t k, int m) {
    const Vec<T> centred = keep_first<T>(load_first(v + k, m) - mean, m);
    return centred * centred;
  });
  return {mean, splat<R>(R(1) / square_root(squares[0] / R(n) + R(kNormEpsilon)))};
}

template <class T>
void normalize(Real<T>* v, int64_t n, const Real<T>* gain, const Real<T>* bias) {
  const Moments<T> m = moments<T>(v, n);
  for_vectors<T>(n, [&](int64_t k, int count) {
    const Vec<T> s = m.standard(load_first(v + k, count));
    store_first(v + k, s * load_first(gain + k, count) + load_first(bias + k, count), count);
  });
}

}  // namespace fastlstm::FASTLSTM_ISA
