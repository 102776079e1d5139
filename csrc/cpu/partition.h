// What each thread of a partition (cpu/plan.h) runs of a layer. Neither torch nor OpenMP is needed here:
// cpu/run_partition.h starts the threads.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/plan.h"
#include "cpu/sequence.h"

namespace fastlstm {

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

// The members of a partition, and the barriers of those that split units.
class Members {
 public:
  // rows: of each direction. P: features of h. Units are split in multiples of unit_block.
  Members(const ThreadPartition& partition, const std::vector<Rows>& rows, int64_t H, int64_t P,
          int64_t unit_block)
      : partition_(partition), rows_(rows), H_(H), P_(P), unit_block_(unit_block) {
    const int groups = partition.row_shares();
    // Both directions have the same number of rows in each step.
    if (groups > 1) row_begin_ = split_rows(rows[0], groups);
    if (partition.split_units)
      for (int64_t k = 0; k < partition.D * groups; ++k)
        barriers_.push_back(std::make_unique<Barrier>(partition.shares()));
  }

  // Calls body(direction, member) for what a thread, of partition.threads(), runs.
  template <class F>
  void run(int thread, F&& body) {
    const int k = thread % partition_.members;
    if (partition_.concurrent) {
      const int64_t d = thread / partition_.members;
      body(d, member(d, k, thread));
    } else {
      for (int64_t d = 0; d < partition_.D; ++d) body(d, member(d, k, thread));
    }
  }

  // Calls body(direction, member) for the whole layer, as one member of each direction.
  template <class F>
  void run_serially(F&& body) const {
    for (int64_t d = 0; d < partition_.D; ++d) body(d, whole(d));
  }

 private:
  Member whole(int64_t d) const { return {0, rows_[d].B, 0, H_, 0, P_, 0, nullptr}; }

  // The k-th member of direction d, on this thread.
  Member member(int64_t d, int k, int thread) {
    Member me = whole(d);
    me.index = thread;
    const int shares = partition_.shares(), groups = partition_.row_shares(), group = k / shares;
    if (groups > 1) {
      me.row_begin = row_begin_[group];
      me.row_end = row_begin_[group + 1];
    }
    if (partition_.split_units) {
      const auto split = [&](int64_t size, int64_t& begin, int64_t& end) {
        const int64_t blocks = (size + unit_block_ - 1) / unit_block_, n = k % shares;
        begin = blocks * n / shares * unit_block_;
        end = std::min(size, blocks * (n + 1) / shares * unit_block_);
      };
      split(H_, me.unit_begin, me.unit_end);
      split(P_, me.feature_begin, me.feature_end);
      me.barrier = barriers_[(partition_.concurrent ? d * groups : 0) + group].get();
    }
    return me;
  }

  const ThreadPartition& partition_;
  const std::vector<Rows>& rows_;
  const int64_t H_, P_, unit_block_;
  std::vector<int64_t> row_begin_;                  // of each group of members of the same rows, and B
  std::vector<std::unique_ptr<Barrier>> barriers_;  // of each group; directions in turn share them
};

}  // namespace fastlstm
