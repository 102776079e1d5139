// Products of bfloat16 factors with float32 results after backward's loop, on all threads: Kernels::gemm of
// cpu/bf16.h.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/layer.h"

namespace fastlstm {

// B [K, N] of row stride ldb into bf16::packed_columns_size(K, N) elements.
template <class T>
void pack_bf16_columns(int threads, const T* b, int64_t K, int64_t N, int64_t ldb, Bf16* packed) {
  for_blocks(threads, N, bf16::kUnits, K * bf16::kUnits, [&](int64_t begin, int64_t end) {
    bf16::kernels<T>()->pack_columns(b, K, N, ldb, begin, end, packed);
  });
}

// product.scratch is allocated here, one per thread. A task has at least kSmallGemmMaxMacs multiply-adds.
inline void multiply_bf16(const bf16::GemmArgs& product) {
  constexpr int64_t kRows = 2 * bf16::kTileRows;
  const int64_t blocks = (product.m + kRows - 1) / kRows, threads = at::get_num_threads();
  const int64_t grain = std::max(kSmallGemmMaxMacs / std::max<int64_t>(1, kRows * product.n * product.k),
                                 (blocks + threads - 1) / threads);
  at::parallel_for(0, blocks, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    thread_local std::vector<Bf16> memory;  // with room to align scratch, since AMX loads 64-byte rows
    Bf16* scratch = nullptr;
    if (product.transposed_a) {
      constexpr uintptr_t kAlign = 64;
      memory.resize(bf16::kGemmScratch + kAlign / sizeof(Bf16));
      const uintptr_t past = reinterpret_cast<uintptr_t>(memory.data()) % kAlign;
      scratch = memory.data() + (kAlign - past) / sizeof(Bf16);
    }
    const int64_t row = begin * kRows;
    bf16::GemmArgs part = product;
    part.m = std::min(product.m, end * kRows) - row;
    part.a += product.transposed_a ? row : row * product.lda;
    part.c += row * product.ldc;
    part.scratch = scratch;
    bf16::kernels<float>()->gemm(part);
  });
}

}  // namespace fastlstm
