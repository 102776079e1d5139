// A product by the tiles of cpu/gemm.h or by the BLAS behind ATen, as gemm_kind decides.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

#include "cpu/layer.h"
#include "cpu/memory.h"

namespace fastlstm {

// [m, n] of like's dtype for Gemm::aligned_blas: rows begin at multiples of kBlasRowAlignBytes.
inline at::Tensor new_aligned(int64_t m, int64_t n, const at::Tensor& like) {
  const int64_t stride = round_up(n, kBlasRowAlignBytes / like.element_size());
  return new_empty({m, stride}, like).narrow(/*dim=*/1, /*start=*/0, n);
}

// On the calling thread; p.scratch is found here.
template <class T, class B>
void multiply_in_tiles(Product<T, B> p) {
  const Kernels<B>& kernel = kernels<B>();
  thread_local std::vector<T> scratch;
  scratch.resize(std::max<size_t>(scratch.size(), kernel.small_product_scratch(p.k)));
  p.scratch = scratch.data();
  kernel.small_product(p);
}

// A tensor on memory that is not its own.
template <class E>
at::Tensor matrix_tensor(const E* data, int64_t rows, int64_t columns, int64_t row_stride,
                         int64_t column_stride) {
  return at::from_blob(const_cast<E*>(data), {rows, columns}, {row_stride, column_stride},
                       at::TensorOptions(c10::CppTypeToScalarType<Stored<E>>::value));
}

template <class T, class B = T>
void multiply(const Product<T, B>& p) {
  const Gemm kind = gemm_kind(p.m, p.n, p.k, p.transposed_a, !std::is_same_v<T, B>);
  if (kind == Gemm::small) return multiply_in_tiles(p);
  if (kind == Gemm::skinny) {
    constexpr int64_t kColumns = kSkinnyGemmTaskColumns;
    return at::parallel_for(0, (p.n + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
      Product<T, B> part = p;
      part.b += begin * kColumns;
      part.c += begin * kColumns;
      part.n = std::min(p.n, end * kColumns) - begin * kColumns;
      multiply_in_tiles(part);
    });
  }
  at::Tensor out = matrix_tensor(p.c, p.m, p.n, p.ldc, 1);
  const at::Tensor a =
      p.transposed_a ? matrix_tensor(p.a, p.m, p.k, 1, p.lda) : matrix_tensor(p.a, p.m, p.k, p.lda, 1);
  const at::Tensor b = to_real<B>(matrix_tensor(p.b, p.k, p.n, p.ldb, 1));
  if (p.add)
    at::addmm_out(out, out, a, b);
  else
    at::mm_out(out, a, b);
}

}  // namespace fastlstm
