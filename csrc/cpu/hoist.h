// Which steps' x W_ih^T a member of forward makes at once, and the rows of x that it takes.
#pragma once

#include <algorithm>

#include "cpu/sequence.h"

namespace fastlstm::FASTLSTM_ISA {

template <class R>
struct HoistedSteps {
  const Rows& rows;
  const Member& me;
  bool reverse;  // the direction's order
  bool ih_prepacked;
  bool used = false;                    // otherwise the steps have rows enough for a product each
  int64_t t0 = 0, end_s = 0;            // it holds the steps of the order before end_s, from time t0 on
  int64_t first_row[kHoistAllMaxRows];  // of each step, in order of time: where its rows begin

  int64_t rows_at(int64_t t) const {
    return std::max<int64_t>(0, std::min(me.row_end, rows.count_at(t)) - me.row_begin);
  }
  int64_t time(int64_t s) const { return reverse ? rows.T - 1 - s : s; }
  int64_t first_row_of(int64_t s) const { return first_row[time(s) - t0]; }

  // Selects the steps from s on whose products are made at once. Returns their rows, 0 where each step makes
  // its own.
  int64_t select(int64_t s) {
    end_s = s + 1;
    used = hoists_input_projection(rows.T, ih_prepacked, rows_at(time(s)));
    if (!used) return 0;
    const int64_t most = hoist_rows(rows.N);
    int64_t total = rows_at(time(s));
    for (; end_s < rows.T && end_s - s < most; ++end_s) {
      const int64_t more = rows_at(time(end_s));
      if (total + more > most) break;
      total += more;
    }
    t0 = std::min(time(s), time(end_s - 1));
    total = 0;
    for (int64_t k = 0; k < end_s - s; ++k) {
      first_row[k] = total;
      total += rows_at(t0 + k);
    }
    return total;
  }

  // The member's rows of x [N, I] in the steps from s on that were selected: by way of `to`, unless they are
  // neighbours.
  const R* gather(int64_t s, const R* x, int64_t I, R* to) const {
    const int64_t steps = end_s - s;
    if (me.row_end - me.row_begin == rows.B || steps == 1) return x + (rows.offset_at(t0) + me.row_begin) * I;
    for (int64_t k = 0; k < steps; ++k)  // a tile of few rows makes half the products
      std::copy_n(x + (rows.offset_at(t0 + k) + me.row_begin) * I, rows_at(t0 + k) * I,
                  to + first_row[k] * I);
    return to;
  }
};

}  // namespace fastlstm::FASTLSTM_ISA
