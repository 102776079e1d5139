// One ISA's table of kernels: included last by each isa_*.cpp, inside its target region.
#pragma once

#include "cpu/backward.h"

namespace fastlstm::FASTLSTM_ISA {

template <class T, Vec<T> (*F)(Vec<T>)>
void map(const T* x, T* y, int64_t n) {
  constexpr int W = kWidth<T>;
  int64_t k = 0;
  for (; k + W <= n; k += W) store(y + k, F(load(x + k)));
  if (k < n) store_part(y + k, F(load_part(x + k, static_cast<int>(n - k))), static_cast<int>(n - k));
}
template <class T>
Vec<T> sigmoid_of(Vec<T> x) {
  return Activation<T>::sigmoid(x);
}
template <class T>
Vec<T> tanh_of(Vec<T> x) {
  return Activation<T>::tanh(x);
}

template <class T>
const Kernels<T>& table() {
  static const Kernels<T> kernels = {kPanel<T>,
                                     forward_packed_size<T>,
                                     pack_forward<T>,
                                     columns_packed_size<T>,
                                     pack_columns<T>,
                                     padded_columns<T>,
                                     forward_scratch<T>,
                                     backward_scratch<T>,
                                     forward<T>,
                                     backward<T>,
                                     map<T, sigmoid_of<T>>,
                                     map<T, tanh_of<T>>};
  return kernels;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace fastlstm::FASTLSTM_ISA
