#include "cuda/products.h"

#include <ATen/ops/addmm_cuda_dispatch.h>
#include <ATen/ops/baddbmm_cuda_dispatch.h>
#include <ATen/ops/bmm_cuda_dispatch.h>
#include <ATen/ops/mm_cuda_dispatch.h>

#include <limits>

// torch offers IEEE for one thread alone (NoTF32Guard) but TF32 only by a flag for the whole process, which
// would lower the precision of products on other threads. So TF32 against the matmul setting, the state of
// torch's defaults, goes to the cuBLAS that libtorch_cuda has loaded, on torch's own handle. Weak: where one
// is missing, the product is IEEE.
struct cublasContext;
extern "C" {
__attribute__((weak)) int cublasSetMathMode(cublasContext*, int mode);
__attribute__((weak)) int cublasSgemm_v2(cublasContext*, int op_a, int op_b, int m, int n, int k,
                                         const float* alpha, const float* a, int lda, const float* b, int ldb,
                                         const float* beta, float* c, int ldc);
__attribute__((weak)) int cublasSgemmStridedBatched(cublasContext*, int op_a, int op_b, int m, int n, int k,
                                                    const float* alpha, const float* a, int lda,
                                                    long long stride_a, const float* b, int ldb,
                                                    long long stride_b, const float* beta, float* c, int ldc,
                                                    long long stride_c, int batch);
}
namespace at::cuda {
__attribute__((weak)) cublasContext* getCurrentCUDABlasHandle();            // torch 2.11
__attribute__((weak)) cublasContext* getCurrentCUDABlasHandle(bool setup);  // torch 2.13
}  // namespace at::cuda

namespace fastlstm::cuda {
namespace {

constexpr int kDefaultMath = 0, kTf32Math = 3;  // CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH

bool has_cublas() {
  cublasContext* (*plain)() = at::cuda::getCurrentCUDABlasHandle;
  cublasContext* (*with_setup)(bool) = at::cuda::getCurrentCUDABlasHandle;
  return (plain || with_setup) && cublasSetMathMode && cublasSgemm_v2 && cublasSgemmStridedBatched;
}

// torch's handle, with the current stream and workspace.
cublasContext* handle() {
  cublasContext* (*plain)() = at::cuda::getCurrentCUDABlasHandle;
  return plain ? plain() : at::cuda::getCurrentCUDABlasHandle(true);
}

int as_int(int64_t n) {
  TORCH_CHECK(n <= std::numeric_limits<int>::max(), "a matrix product takes sizes below 2^31, got ", n);
  return static_cast<int>(n);
}

// A matrix [M, N] (the last two dimensions) as cuBLAS, which is column-major, reads it: as its transpose.
struct Operand {
  explicit Operand(const at::Tensor& tensor) : held(tensor) {
    if (!row_major(held) && !column_major(held)) held = held.contiguous();
    const bool rows = row_major(held);
    const int64_t outer = rows ? held.stride(-2) : held.stride(-1),
                  inner = rows ? held.size(-1) : held.size(-2);
    op = rows ? 0 : 1;
    ld = as_int(std::max({outer, inner, int64_t{1}}));  // a dimension of one element may have any stride
    stride = held.dim() == 3 ? held.stride(0) : 0;
  }
  static bool row_major(const at::Tensor& t) {
    return (t.stride(-1) == 1 || t.size(-1) == 1) && (t.stride(-2) >= t.size(-1) || t.size(-2) == 1);
  }
  static bool column_major(const at::Tensor& t) {
    return (t.stride(-2) == 1 || t.size(-2) == 1) && (t.stride(-1) >= t.size(-2) || t.size(-1) == 1);
  }
  const float* data() const { return static_cast<const float*>(held.const_data_ptr()); }

  at::Tensor held;
  int op, ld;
  long long stride;
};

void multiply_tf32(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) {
  // out^T = b^T a^T
  const Operand first(b), second(a);
  const int m = as_int(b.size(-1)), n = as_int(a.size(-2)), k = as_int(a.size(-1));
  const float one = 1, beta = add ? 1 : 0;
  float* const c = static_cast<float*>(out.mutable_data_ptr());
  cublasContext* const cublas = handle();
  int status = cublasSetMathMode(cublas, kTf32Math);
  if (status == 0 && out.dim() == 2) {
    status = cublasSgemm_v2(cublas, first.op, second.op, m, n, k, &one, first.data(), first.ld, second.data(),
                            second.ld, &beta, c, m);
  } else if (status == 0) {
    status = cublasSgemmStridedBatched(cublas, first.op, second.op, m, n, k, &one, first.data(), first.ld,
                                       first.stride, second.data(), second.ld, second.stride, &beta, c, m,
                                       static_cast<long long>(m) * n, as_int(out.size(0)));
  }
  cublasSetMathMode(cublas, kDefaultMath);
  TORCH_CHECK(status == 0, "cuBLAS gave status ", status, " for a product of ", a.sizes(), " and ",
              b.sizes());
}

}  // namespace

Products::Products(at::ScalarType dtype) {
  if (dtype != at::kFloat) return;
  const at::Context& context = at::globalContext();
  const bool matmul =
      context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) == at::Float32Precision::TF32;
  const bool wanted = context.userEnabledCuDNN() ? context.allowTF32CuDNN(at::Float32Op::RNN) : matmul;
  if (!wanted && matmul) ieee_.emplace();
  own_tf32_ = wanted && !matmul && has_cublas();
  tf32_ = wanted && (matmul || own_tf32_);
}

void Products::operator()(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add) const {
  // ATen's CUDA functions themselves: a trip through the dispatcher costs as much host time as a launch.
  if (own_tf32_) {
    multiply_tf32(out, a, b, add);
  } else if (out.scalar_type() != a.scalar_type()) {
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
