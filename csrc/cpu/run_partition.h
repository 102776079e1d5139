// Running a layer on the threads of its plan (cpu/plan.h), and the machine that plans are made for.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <optional>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/int8.h"
#include "cpu/partition.h"

namespace fastlstm {

// The thread partition of every call, while calibration or a test sets one and no other thread calls.
inline std::optional<PartitionChoice> forced_partition;

// Overrides the detection. Set by tests only, while no other thread calls.
inline std::optional<bool> forced_blas_is_slow_at_unaligned_rows;

// MKL chooses kernels by CPU vendor. Those for AMD CPUs with AVX2 are slow if rows of C are not 32-byte
// aligned.
inline bool blas_is_slow_at_unaligned_rows() {
  static const bool detected = at::hasMKL() && is_amd_with_avx2();
  return forced_blas_is_slow_at_unaligned_rows.value_or(detected);
}

// What a call on this thread may use.
inline Machine this_machine() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(),
          l2_bytes(),
          kernels<float>().width * static_cast<int64_t>(sizeof(float)),
          bf16::kernels<float>() != nullptr,
          &kCostFigures,
          forced_partition,
          int8::kernels().layout.width,
          blas_is_slow_at_unaligned_rows()};
}

// Runs body(direction, member) for every member of a partition, each on a thread of its own.
template <class F>
void run_partition(const ThreadPartition& partition, const std::vector<Rows>& rows, int64_t H, int64_t P,
                   int64_t unit_block, F&& body) {
  Members members(partition, rows, H, P, unit_block);
  const int threads = partition.threads();
  if (threads == 1) return members.run_serially(body);
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  {
    // A runtime that grants fewer threads must not leave a barrier waiting for the others.
    if (omp_get_num_threads() != threads) {
#pragma omp single
      members.run_serially(body);
    } else {
      members.run(omp_get_thread_num(), body);
    }
  }
#else
  members.run_serially(body);
#endif
}

}  // namespace fastlstm
