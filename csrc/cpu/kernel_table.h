// One ISA's tables of kernels: included last by each isa_*.cpp, inside its target region. FASTLSTM_TABLES
// says which if not all.
#pragma once

#include "cpu/norm_backward.h"
#include "cpu/norm_forward.h"

#if !defined(FASTLSTM_TABLES)
#define FASTLSTM_TABLES FASTLSTM_FOR_EACH_KERNELS
#endif

namespace fastlstm::FASTLSTM_ISA {

// Sums of NV neighbouring vectors of columns, n elements of each, over N rows: a row's are read at once,
// since rows lie pages apart.
template <class T, int NV>
FASTLSTM_INLINE void sum_vectors(const T* x, int64_t N, int64_t columns, int n, T* out) {
  constexpr int64_t W = kWidth<T>;
  constexpr int64_t kBlock = 32;  // rows summed apart, so that rounding grows with N / 32 and not with N
  Vec<T> total[NV] = {};
  for (int64_t r0 = 0; r0 < N; r0 += kBlock) {
    Vec<T> part[NV] = {};
    for (int64_t r = r0; r < std::min(N, r0 + kBlock); ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const T* from = x + r * columns + v * W;
        part[v] += n == W ? load(from) : load_part(from, n);
      }
    for (int v = 0; v < NV; ++v) total[v] += part[v];
  }
  for (int v = 0; v < NV; ++v) store_part(out + v * W, total[v], n);
}

template <class T>
void column_sums(const T* x, int64_t N, int64_t columns, int64_t begin, int64_t end, T* out) {
  constexpr int64_t W = kWidth<T>;
  int64_t j = begin;
  for (; j + 4 * W <= end; j += 4 * W) sum_vectors<T, 4>(x + j, N, columns, static_cast<int>(W), out + j);
  for (; j < end; j += W)
    sum_vectors<T, 1>(x + j, N, columns, static_cast<int>(std::min(W, end - j)), out + j);
}

template <class T, Vec<T> (*F)(Vec<T>)>
void map(const T* x, T* y, int64_t n) {
  constexpr int W = kWidth<T>;
  int64_t k = 0;
  for (; k + W <= n; k += W) store(y + k, F(load(x + k)));
  if (k < n) store_part(y + k, F(load_part(x + k, static_cast<int>(n - k))), static_cast<int>(n - k));
}
template <class T>
void round_numbers(const Real<T>* x, int64_t n, T* y) {
  constexpr int W = kWidth<T>;
  int64_t k = 0;
  for (; k + W <= n; k += W) store(y + k, load(x + k));
  if (k < n) store_part(y + k, load_part(x + k, static_cast<int>(n - k)), static_cast<int>(n - k));
}
template <class T>
Vec<T> sigmoid_of(Vec<T> x) {
  return Activation<T>::sigmoid(x);
}
template <class T>
Vec<T> tanh_of(Vec<T> x) {
  return Activation<T>::tanh(x);
}

template <class T, class S>
const Kernels<T, S>& table() {
  using R = Real<T>;
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, PanelBf16>) {  // of frozen layers
    static const Kernels<T, S> kernels = [] {
      Kernels<T, S> k{};
      k.width = kWidth<T>, k.unit_block = kPanel<T>;
      k.forward_scratch = forward_scratch<T>;
      k.forward = forward<T, S>;
      return k;
    }();
    return kernels;
  } else {
    static const Kernels<T, S> kernels = {kWidth<T>,
                                          kPanel<T>,
                                          forward_packed_size<T>,
                                          pack_forward<T, S>,
                                          columns_packed_size<T>,
                                          pack_columns<T, S>,
                                          padded_columns<T>,
                                          forward_scratch<T>,
                                          backward_scratch<T>,
                                          forward<T, S>,
                                          backward<T, S>,
                                          norm_forward_scratch<T>,
                                          norm_backward_scratch<T>,
                                          norm_sums<T>,
                                          norm_forward<T, S>,
                                          norm_backward<T, S>,
                                          normalize<T>,
                                          small_product<T>,
                                          small_product_scratch<R>,
                                          column_sums<R>,
                                          round_numbers<T>,
                                          map<T, sigmoid_of<T>>,
                                          map<T, tanh_of<T>>};
    return kernels;
  }
}
#define FASTLSTM_INSTANTIATE(...) template const Kernels<__VA_ARGS__>& table<__VA_ARGS__>();
FASTLSTM_TABLES(FASTLSTM_INSTANTIATE)
#undef FASTLSTM_INSTANTIATE

}  // namespace fastlstm::FASTLSTM_ISA
