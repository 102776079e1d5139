// Weight gradients of many groups of rows at once: fastlstm::grouped_products of fastlstm/ops/register.py.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/memory.h"
#include "cpu/product.h"

namespace fastlstm {
namespace {

template <class T>
at::Tensor products(const at::Tensor& a, const at::Tensor& b, int64_t groups) {
  const int64_t steps = a.size(0), m = a.size(2), n = b.size(2), rows = a.size(1) / groups;
  at::Tensor out = new_empty({groups, m, n}, a);
  if (steps * rows == 0) return out.zero_();
  T* to = out.mutable_data_ptr<T>();
  const T *pa = a.const_data_ptr<T>(), *pb = b.const_data_ptr<T>();
  at::parallel_for(
      0, groups, 1 + kGroupedWgradTaskMinMacs / (steps * rows * m * n + 1), [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g)
          for (int64_t r = g * rows; r < (g + 1) * rows; ++r)
            multiply<T>({m, n, steps, pa + r * a.stride(1), a.stride(0), true, pb + r * b.stride(1),
                         b.stride(0), r > g * rows, to + g * m * n, n, nullptr});
      });
  return out;
}

at::Tensor grouped_products(const at::Tensor& a, const at::Tensor& b, int64_t groups) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1),
              "a and b must be [T, B, m] and [T, B, n], got ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK(groups > 0 && a.size(1) % groups == 0, "groups must divide the ", a.size(1), " rows, got ",
              groups);
  TORCH_CHECK(
      a.scalar_type() == b.scalar_type() && (a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble),
      "a and b must both be float32 or float64, got ", a.scalar_type(), " and ", b.scalar_type());
  const auto rows_of = [](const at::Tensor& t) { return t.stride(2) == 1 ? t : t.contiguous(); };
  return a.scalar_type() == at::kFloat ? products<float>(rows_of(a), rows_of(b), groups)
                                       : products<double>(rows_of(a), rows_of(b), groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) { m.impl("grouped_products", grouped_products); }

}  // namespace fastlstm
