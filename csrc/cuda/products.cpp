#include "cuda/products.h"

#include <ATen/ops/addmm_cuda_dispatch.h>
#include <ATen/ops/baddbmm_cuda_dispatch.h>
#include <ATen/ops/bmm_cuda_dispatch.h>
#include <ATen/ops/mm_cuda_dispatch.h>
#include <library_types.h>

#include <algorithm>
#include <limits>

// The cuBLAS that libtorch_cuda has loaded, through torch's handle. Two reasons: the checks of at::mm_out
// cost the host more than the launch of a step's GEMM; and torch offers IEEE for one thread (NoTF32Guard),
// but TF32 only by a flag of the process, which would lower the precision of other threads' GEMMs. The
// symbols are weak: if one is missing, ATen multiplies, in IEEE unless all flags say TF32.
extern "C" {
__attribute__((weak)) int cublasGemmEx(cublasContext*, int op_a, int op_b, int m, int n, int k,
                                       const void* alpha, const void* a, cudaDataType type_a, int lda,
                                       const void* b, cudaDataType type_b, int ldb, const void* beta, void* c,
                                       cudaDataType type_c, int ldc, int compute, int algorithm);
__attribute__((weak)) int cublasGemmStridedBatchedEx(cublasContext*, int op_a, int op_b, int m, int n, int k,
                                                     const void* alpha, const void* a, cudaDataType type_a,
                                                     int lda, long long stride_a, const void* b,
                                                     cudaDataType type_b, int ldb, long long stride_b,
                                                     const void* beta, void* c, cudaDataType type_c, int ldc,
                                                     long long stride_c, int batch, int compute,
                                                     int algorithm);
}
namespace at::cuda {
__attribute__((weak)) cublasContext* getCurrentCUDABlasHandle();            // torch 2.11
__attribute__((weak)) cublasContext* getCurrentCUDABlasHandle(bool setup);  // torch 2.13
}  // namespace at::cuda

namespace fastlstm::cuda {
namespace {

// cublasComputeType_t and cublasGemmAlgo_t.
constexpr int kComputeF32 = 68, kComputeF64 = 70, kComputeTf32 = 77, kAnyAlgorithm = -1;

// torch's handle, whose math mode follows the flags and NoTF32Guard.
cublasContext* handle() {
  cublasContext* (*plain)() = at::cuda::getCurrentCUDABlasHandle;
  cublasContext* (*with_setup)(bool) = at::cuda::getCurrentCUDABlasHandle;
  if (!(plain || with_setup) || !cublasGemmEx || !cublasGemmStridedBatchedEx) return nullptr;
  return plain ? plain() : with_setup(true);
}

cudaDataType cuda_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return CUDA_R_64F;
    case at::kHalf:
      return CUDA_R_16F;
    case at::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

bool fits_int(const at::Tensor& t) {
  constexpr int64_t max_int = std::numeric_limits<int>::max();
  return t.size(-1) <= max_int && t.size(-2) <= max_int && t.stride(-1) <= max_int && t.stride(-2) <= max_int;
}

// A row-major matrix [M, N] (the last two dimensions) for cuBLAS, which is column-major: its transpose.
struct Operand {
  explicit Operand(const at::Tensor& tensor) : matrix(tensor) {
    if (!row_major(matrix) && !column_major(matrix)) matrix = matrix.contiguous();
    const bool rows = row_major(matrix);
    const int64_t outer = rows ? matrix.stride(-2) : matrix.stride(-1),
                  inner = rows ? matrix.size(-1) : matrix.size(-2);
    op = rows ? 0 : 1;
    ld = static_cast<int>(std::max(outer, inner));  // a dimension of one element may have any stride
    stride = matrix.dim() == 3 ? matrix.stride(0) : 0;
  }
  static bool row_major(const at::Tensor& t) {
    return (t.stride(-1) == 1 || t.size(-1) == 1) && (t.stride(-2) >= t.size(-1) || t.size(-2) == 1);
  }
  static bool column_major(const at::Tensor& t) {
    return (t.stride(-2) == 1 || t.size(-2) == 1) && (t.stride(-1) >= t.size(-2) || t.size(-1) == 1);
  }

  at::Tensor matrix;
  int op, ld;
  long long stride;
};

}  // namespace

Gemm::Gemm(at::ScalarType dtype) : type_(cuda_type(dtype)) {
  compute_ = dtype == at::kDouble ? kComputeF64 : kComputeF32;
  if (dtype == at::kFloat) {
    const at::Context& context = at::globalContext();
    const bool matmul = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                        at::Float32Precision::TF32;
    const bool tf32 = context.userEnabledCuDNN() ? context.allowTF32CuDNN(at::Float32Op::RNN) : matmul;
    if (tf32) compute_ = kComputeTf32;
    if (!tf32 && matmul) ieee_.emplace();
  }
  cublas_ = handle();
}

bool Gemm::tf32() const { return compute_ == kComputeTf32; }

void Gemm::cublas_gemm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) const {
  // out^T = b^T a^T
  const Operand first(b), second(a);
  const int m = static_cast<int>(b.size(-1)), n = static_cast<int>(a.size(-2)),
            k = static_cast<int>(a.size(-1));
  const float ones[] = {0, 1};
  const double doubles[] = {0, 1};
  const bool wide = compute_ == kComputeF64;
  const void* const alpha = wide ? static_cast<const void*>(&doubles[1]) : &ones[1];
  const void* const beta = wide ? static_cast<const void*>(&doubles[add]) : &ones[add];
  const auto type = static_cast<cudaDataType>(type_);
  const cudaDataType out_type = cuda_type(out.scalar_type());
  void* const c = out.mutable_data_ptr();
  const int status =
      out.dim() == 2
          ? cublasGemmEx(cublas_, first.op, second.op, m, n, k, alpha, first.matrix.const_data_ptr(), type,
                         first.ld, second.matrix.const_data_ptr(), type, second.ld, beta, c, out_type, m,
                         compute_, kAnyAlgorithm)
          : cublasGemmStridedBatchedEx(cublas_, first.op, second.op, m, n, k, alpha,
                                       first.matrix.const_data_ptr(), type, first.ld, first.stride,
                                       second.matrix.const_data_ptr(), type, second.ld, second.stride, beta,
                                       c, out_type, m, static_cast<long long>(m) * n,
                                       static_cast<int>(out.size(0)), compute_, kAnyAlgorithm);
  TORCH_CHECK(status == 0, "cuBLAS gave status ", status, " for a GEMM of ", a.sizes(), " and ", b.sizes());
}

void Gemm::operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) const {
  // ATen multiplies into 16-bit outputs: it follows torch's flags of reduced-precision reductions.
  const bool rounded = out.scalar_type() == at::kHalf || out.scalar_type() == at::kBFloat16;
  if (cublas_ && !rounded && a.numel() > 0 && b.numel() > 0 && fits_int(a) && fits_int(b)) {
    return cublas_gemm(out, a, b, add);
  }
  // Without the dispatcher, which costs as much host time as a launch.
  if (out.scalar_type() != a.scalar_type()) {
    TORCH_INTERNAL_ASSERT(!add);
    out.dim() == 2 ? at::cuda::mm_out(out, a, b, out.scalar_type())
                   : at::cuda::bmm_out(out, a, b, out.scalar_type());
  } else if (add) {
    out.dim() == 2 ? at::cuda::addmm_(out, a, b) : at::cuda::baddbmm_(out, a, b);
  } else {
    out.dim() == 2 ? at::cuda::mm_out(out, a, b) : at::cuda::bmm_out(out, a, b);
  }
}

}  // namespace fastlstm::cuda
