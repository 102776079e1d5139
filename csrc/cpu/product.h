// A product by the tiles of cpu/gemm.h or by the BLAS behind ATen, whichever takes less time.
#pragma once

#include <ATen/ATen.h>

#include "cpu/sequence.h"

namespace fastlstm {

// Up to so many multiply-adds the tiles of cpu/gemm.h take less time than a BLAS call.
inline constexpr int64_t kOwnProducts = 1 << 20;

// A product through ATen where that is worth a call; p.scratch is found here.
template <class T>
void multiply(Product<T> p) {
  if (p.m * p.n * p.k <= kOwnProducts && p.k <= (1 << 13)) {  // a deeper one's scratch would be megabytes
    const Kernels<T>& kernel = kernels<T>();
    thread_local std::vector<T> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), kernel.small_product_scratch(p.k)));
    p.scratch = scratch.data();
    return kernel.small_product(p);
  }
  const auto view = [](const T* data, int64_t rows, int64_t columns, int64_t row, int64_t column) {
    return at::from_blob(const_cast<T*>(data), {rows, columns}, {row, column},
                         at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  };
  at::Tensor out = view(p.c, p.m, p.n, p.ldc, 1);
  const at::Tensor a = p.transposed_a ? view(p.a, p.m, p.k, 1, p.lda) : view(p.a, p.m, p.k, p.lda, 1);
  const at::Tensor b = view(p.b, p.k, p.n, p.ldb, 1);
  if (p.add)
    at::addmm_out(out, out, a, b);
  else
    at::mm_out(out, a, b);
}

}  // namespace fastlstm
