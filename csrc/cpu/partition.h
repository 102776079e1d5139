// Running a layer on the threads of its plan (cpu/plan.h), and the machine that plans are made for.
#pragma once

#include <ATen/Parallel.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/plan.h"
#include "cpu/sequence.h"

namespace fastlstm {

// What a call on this thread may use.
inline Machine this_machine() {
  return {at::in_parallel_region() ? 1 : at::get_num_threads(), l2_bytes(),
          kernels<float>().width * static_cast<int64_t>(sizeof(float)), bf16::kernels() != nullptr};
}

// The sorted rows at which n members begin, and B, so that all have about the same work: of a row its steps,
// and in each step of its longest row the reading of the weights, which takes as long as two rows.
inline std::vector<int64_t> split_rows(const Rows& rows, int n) {
  std::vector<int64_t> begin(n + 1);
  if (!rows.count) {
    for (int k = 0; k <= n; ++k) begin[k] = rows.B * k / n;
    return begin;
  }
  std::vector<int64_t> length(rows.B);  // row r has as many steps as steps have more than r rows
  for (int64_t r = 0, t = rows.T; r < rows.B; ++r) {
    while (t > 0 && rows.count[t - 1] <= r) --t;
    length[r] = t;
  }
  // Whether no member has more than `most` to do, each with as many rows as that allows.
  const auto fits = [&](int64_t most) {
    int k = 0;
    int64_t left = -1;
    for (int64_t r = 0; r < rows.B; ++r) {
      if (length[r] > left) {
        left = most - kWeightReadCostRows * length[r];
        if (k == n || length[r] > left) return false;
        begin[k++] = r;
      }
      left -= length[r];
    }
    std::fill(begin.begin() + k, begin.end(), rows.B);
    return true;
  };
  int64_t too_little = -1, enough = rows.N + kWeightReadCostRows * rows.T;
  while (enough - too_little > 1) {
    const int64_t middle = (too_little + enough) / 2;
    (fits(middle) ? enough : too_little) = middle;
  }
  fits(enough);
  return begin;
}

// Runs body(direction, member) for every part of a partition, each on a thread of its own.
template <class F>
void run_partition(const ThreadPartition& partition, const std::vector<Rows>& rows, int64_t H, int64_t P,
                   int64_t unit_block, F&& body) {
  std::vector<int64_t> begin;  // of both directions, whose rows have the same steps
  if (partition.members > 1 && !partition.split_units) begin = split_rows(rows[0], partition.members);
  const auto member = [&](int64_t d, int k, int n, bool units, Barrier* barrier, int index) {
    Member me{0, rows[d].B, 0, H, 0, P, index, nullptr};
    if (units) {
      const auto split = [&](int64_t size, int64_t& begin, int64_t& end) {
        const int64_t blocks = (size + unit_block - 1) / unit_block;
        begin = blocks * k / n * unit_block;
        end = std::min(size, blocks * (k + 1) / n * unit_block);
      };
      split(H, me.unit_begin, me.unit_end);
      split(P, me.feature_begin, me.feature_end);
      me.barrier = barrier;
    } else if (n > 1) {
      me.row_begin = begin[k];
      me.row_end = begin[k + 1];
    }
    body(d, me);
  };
  const auto serial = [&] {
    for (int64_t d = 0; d < partition.D; ++d) member(d, 0, 1, false, nullptr, 0);
  };
  const int threads = partition.threads();
  if (threads == 1) return serial();
#if defined(_OPENMP)
  Barrier first(partition.members), second(partition.members);
#pragma omp parallel num_threads(threads)
  {
    // A runtime that grants fewer threads must not leave a barrier waiting for the others.
    if (omp_get_num_threads() != threads) {
#pragma omp single
      serial();
    } else {
      const int index = omp_get_thread_num(), k = index % partition.members;
      if (partition.concurrent) {
        const int64_t d = index / partition.members;
        member(d, k, partition.members, partition.split_units, d == 0 ? &first : &second, index);
      } else {
        for (int64_t d = 0; d < partition.D; ++d)
          member(d, k, partition.members, partition.split_units, &first, index);
      }
    }
  }
#else
  serial();
#endif
}

}  // namespace fastlstm
