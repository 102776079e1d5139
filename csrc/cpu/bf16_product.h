// Products of bfloat16 factors with float32 results after backward's loop, on all threads: Kernels::gemm of
// cpu/bf16.h.
#pragma once

#include "cpu/bf16.h"
#include "cpu/layer.h"

namespace fastlstm {

// B [K, N] of row stride ldb into bf16::packed_columns_size(K, N) elements.
template <class T>
void pack_bf16_columns(const T* b, int64_t K, int64_t N, int64_t ldb, Bf16* packed) {
  for_blocks(at::get_num_threads(), N, bf16::kUnits, K * bf16::kUnits, [&](int64_t begin, int64_t end) {
    bf16::kernels<T>()->pack_columns(b, K, N, ldb, begin, end, packed);
  });
}

// product.scratch is found here, one for each thread.
inline void multiply_bf16(const bf16::GemmArgs& product) {
  const auto gemm = bf16::kernels<float>()->gemm;
  for_blocks(at::get_num_threads(), product.m, 2 * bf16::kTileRows, 2 * bf16::kTileRows * product.n,
             [&](int64_t begin, int64_t end) {
               thread_local std::vector<Bf16> scratch;
               if (product.transposed_a) scratch.resize(bf16::kGemmScratch);
               bf16::GemmArgs part = product;
               part.m = end - begin;
               part.a += product.transposed_a ? begin : begin * product.lda;
               part.c += begin * product.ldc;
               part.scratch = scratch.data();
               gemm(part);
             });
}

}  // namespace fastlstm
