// How many threads work on a layer and on which part each: Plan, and running it.
#pragma once

#include <ATen/Parallel.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <vector>

#include "cpu/sequence.h"

namespace fastlstm {

// Weights of so many bytes a thread packs sooner than it can fetch them packed from another's cache; and of
// so many it reads from its L2 in little time beside the products of a few rows.
constexpr double kSmallWeights = 1 << 16, kMediumWeights = 3 << 17;

// The number of rows of a row's own step, in the mean over all rows: above N / T where rows end one by one.
inline double rows_beside(const Rows& rows) {
  if (!rows.count) return rows.B;
  double sum = 0;
  for (int64_t t = 0; t < rows.T; ++t) sum += double(rows.count[t]) * rows.count[t];
  return sum / std::max<int64_t>(1, rows.N);
}

// The threads of a layer: per direction a number of members that split either the rows (and never meet) or
// the units (and meet at barriers in every step).
struct Plan {
  int64_t D;
  int members = 1;          // per direction
  bool concurrent = false;  // directions on threads of their own
  bool split_units = false;
  int copies = 1;  // of a direction's packed weights

  int threads() const { return members * (concurrent ? static_cast<int>(D) : 1); }
  // Whether each thread is the only one to read its packed weights: it then packs them, so that they lie in
  // its cache.
  bool own_weights() const { return split_units || copies > 1 || (concurrent && members == 1); }
  // Which copy the member of this index reads.
  int64_t copy(int index) const { return copies > 1 ? index % members : 0; }
};

// From the sizes of a layer; I is the number of input features if the members make x W_ih^T too. Only rows
// are split if `rows_only`.
template <class E, class S>
Plan make_plan(const Kernels<E, S>& kernel, int64_t D, const Rows& of, int64_t I, int64_t H, int64_t P,
               bool rows_only = false) {
  const int64_t T = of.T;
  const double rows = double(of.N) / T;  // of a step, in the mean
  // A step's multiply-adds; a fork and join cost about what 5e5 of them take, a barrier 1e4. A single row
  // waits for its weights, from the L2 or, in a single step, from where the last call left them.
  const int64_t units = (H + kernel.width - 1) / kernel.width * kernel.width;  // of whole vectors
  const double step = std::max(rows, T == 1 ? 4.0 : 2.0) * 4 * units * (I + P + 16);
  Plan plan{D};
  const int available = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (available == 1 || step * T * D < 1e6) return plan;
  plan.concurrent = D == 2;
  const int most = available / (plan.concurrent ? 2 : 1);
  if (most <= 1) return plan;
  const double weights = 4.0 * H * (I + P) * sizeof(Real<E>);
  // Splitting rows reads all weights in every thread: fine while its L2 keeps them and each has some rows
  // for them, fewer if they are small, one with projection, where units would meet twice a step. In a single
  // step each thread packs them for itself, for which it must have several tiles. Where reading them takes
  // less time than the rows do, those count that most rows have beside them: one long row among short ones
  // leaves a thread little to do after the rest has ended.
  const bool large = T == 1 || weights > 0.75 * l2_bytes();
  const double least_rows = large ? 24 : P != H ? 1 : weights > kSmallWeights ? 3.5 : 2;
  const double own = (weights > kMediumWeights ? rows : rows_beside(of)) / most;
  const bool rows_fit = own >= least_rows && (T > 1 || weights <= (1 << 20));
  if (rows_only || rows_fit) {
    plan.members = static_cast<int>(std::clamp<int64_t>(of.B, 1, most));
    if (weights <= kSmallWeights) plan.copies = plan.members;
    return plan;
  }
  if (step >= 6e4) {
    plan.members = static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(1, H / kernel.unit_block)));
    plan.split_units = plan.members > 1;
  }
  return plan;
}

// The sorted rows at which n members begin, and B, so that all have about the same work: of a row its steps,
// and in each step of its longest row the reading of the weights, which takes as long as two rows.
inline std::vector<int64_t> split_rows(const Rows& rows, int n) {
  constexpr int64_t kReading = 2;
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
        left = most - kReading * length[r];
        if (k == n || length[r] > left) return false;
        begin[k++] = r;
      }
      left -= length[r];
    }
    std::fill(begin.begin() + k, begin.end(), rows.B);
    return true;
  };
  int64_t too_little = -1, enough = rows.N + kReading * rows.T;
  while (enough - too_little > 1) {
    const int64_t middle = (too_little + enough) / 2;
    (fits(middle) ? enough : too_little) = middle;
  }
  fits(enough);
  return begin;
}

// Runs body(direction, member) for every part of the plan, each on a thread of its own.
template <class F>
void run_plan(const Plan& plan, const std::vector<Rows>& rows, int64_t H, int64_t P, int64_t unit_block,
              F&& body) {
  std::vector<int64_t> begin;  // of both directions, whose rows have the same steps
  if (plan.members > 1 && !plan.split_units) begin = split_rows(rows[0], plan.members);
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
    for (int64_t d = 0; d < plan.D; ++d) member(d, 0, 1, false, nullptr, 0);
  };
  const int threads = plan.threads();
  if (threads == 1) return serial();
#if defined(_OPENMP)
  Barrier first(plan.members), second(plan.members);
#pragma omp parallel num_threads(threads)
  {
    // A runtime that grants fewer threads must not leave a barrier waiting for the others.
    if (omp_get_num_threads() != threads) {
#pragma omp single
      serial();
    } else {
      const int index = omp_get_thread_num(), k = index % plan.members;
      if (plan.concurrent) {
        const int64_t d = index / plan.members;
        member(d, k, plan.members, plan.split_units, d == 0 ? &first : &second, index);
      } else {
        for (int64_t d = 0; d < plan.D; ++d) member(d, k, plan.members, plan.split_units, &first, index);
      }
    }
  }
#else
  serial();
#endif
}

}  // namespace fastlstm
