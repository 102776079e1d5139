// A cuBLAS for the host, as plain loops, and the functions of ATen that csrc/cuda/products.cpp falls back to.
#pragma once

#include <ATen/ops/add.h>
#include <ATen/ops/matmul.h>

#include "cuda/step.h"

namespace fastlstm::cuda::host {

int calls = 0, last_compute = 0;  // of cuBLAS

double read(const void* p, cudaDataType type, int64_t i) {
  switch (type) {
    case CUDA_R_16F:
      return __half2float(static_cast<const __half*>(p)[i]);
    case CUDA_R_16BF:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    case CUDA_R_64F:
      return static_cast<const double*>(p)[i];
    default:
      return static_cast<const float*>(p)[i];
  }
}

// c [m, n] = op(a) [m, k] op(b) [k, n] + beta c, all column-major, in the types of sums alone.
template <class A>
void multiply(int op_a, int op_b, int m, int n, int k, A alpha, const void* a, cudaDataType type, int64_t lda,
              int64_t from_a, const void* b, int64_t ldb, int64_t from_b, A beta, A* c, int64_t ldc) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      A sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += static_cast<A>(read(a, type, from_a + (op_a ? l + i * lda : i + l * lda)) *
                              read(b, type, from_b + (op_b ? j + l * ldb : l + j * ldb)));
      }
      A& out = c[i + j * ldc];
      out = beta == 0 ? alpha * sum : alpha * sum + beta * out;
    }
  }
}

// ATen's products for halves: sums in float, rounded once.
at::Tensor& aten(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  const at::ScalarType sum = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(out.is_contiguous() && a.dim() == out.dim() && b.dim() == out.dim());
  const at::Tensor product = at::matmul(a.to(sum), b.to(sum));
  TORCH_CHECK(product.sizes() == out.sizes());
  return out.copy_(add ? at::add(out.to(sum), product) : product);
}

}  // namespace fastlstm::cuda::host

extern "C" {
int cublasGemmStridedBatchedEx(cublasContext* handle, int op_a, int op_b, int m, int n, int k,
                               const void* alpha, const void* a, cudaDataType type_a, int lda,
                               long long stride_a, const void* b, cudaDataType type_b, int ldb,
                               long long stride_b, const void* beta, void* c, cudaDataType type_c, int ldc,
                               long long stride_c, int batch, int compute, int algorithm) {
  using namespace fastlstm::cuda::host;
  ++calls, last_compute = compute;
  const bool wide = compute == 70;
  // What cuBLAS refuses: leading dimensions below the rows, and types that do not go together.
  if (handle == nullptr || algorithm != -1 || type_a != type_b ||
      type_c != (wide ? CUDA_R_64F : CUDA_R_32F) || (type_a == CUDA_R_64F) != wide ||
      (compute == 77 && type_a != CUDA_R_32F) || m < 1 || n < 1 || k < 1 || lda < (op_a ? k : m) ||
      ldb < (op_b ? n : k) || ldc < m) {
    return 7;
  }
  for (int64_t g = 0; g < batch; ++g) {
    const auto run = [&](auto* out) {
      using A = std::remove_pointer_t<decltype(out)>;
      multiply<A>(op_a, op_b, m, n, k, *static_cast<const A*>(alpha), a, type_a, lda, g * stride_a, b, ldb,
                  g * stride_b, *static_cast<const A*>(beta), out + g * stride_c, ldc);
    };
    wide ? run(static_cast<double*>(c)) : run(static_cast<float*>(c));
  }
  return 0;
}

int cublasGemmEx(cublasContext* handle, int op_a, int op_b, int m, int n, int k, const void* alpha,
                 const void* a, cudaDataType type_a, int lda, const void* b, cudaDataType type_b, int ldb,
                 const void* beta, void* c, cudaDataType type_c, int ldc, int compute, int algorithm) {
  return cublasGemmStridedBatchedEx(handle, op_a, op_b, m, n, k, alpha, a, type_a, lda, 0, b, type_b, ldb, 0,
                                    beta, c, type_c, ldc, 0, 1, compute, algorithm);
}
}

namespace at::cuda {
using fastlstm::cuda::host::aten;
cublasContext* getCurrentCUDABlasHandle() { return reinterpret_cast<cublasContext*>(1); }
Tensor& mm_out(Tensor& out, const Tensor& a, const Tensor& b) { return aten(out, a, b, false); }
Tensor& mm_out(Tensor& out, const Tensor& a, const Tensor& b, ScalarType) { return aten(out, a, b, false); }
Tensor& bmm_out(Tensor& out, const Tensor& a, const Tensor& b) { return aten(out, a, b, false); }
Tensor& bmm_out(Tensor& out, const Tensor& a, const Tensor& b, ScalarType) { return aten(out, a, b, false); }
Tensor& addmm_(Tensor& out, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  return aten(out, a, b, true);
}
Tensor& baddbmm_(Tensor& out, const Tensor& a, const Tensor& b, const Scalar&, const Scalar&) {
  return aten(out, a, b, true);
}
}  // namespace at::cuda
