// Masks in vectors, for the time loops of forward and backward.
#pragma once

#include "cpu/vec.h"

namespace fastlstm::FASTLSTM_ISA {

// Elements [k, k + n), n <= W, of a mask in the row that is step t of the caller's row b.
template <class T>
FASTLSTM_INLINE Vec<T> load_mask(const RowMask<Real<T>>& m, int64_t t, int64_t b, int64_t k, int n) {
  const int64_t at = t * m.step_stride + b * m.row_stride + k;
  return m.flags ? load_flags<T>(m.flags + at, n) : load_part(m.numbers + at, n);
}
// The state of which a zoneout's share is kept as it was before the step.
template <class T>
FASTLSTM_INLINE Vec<T> zoned(const RowMask<Real<T>>& m, Vec<T> share, Vec<T> before, Vec<T> after) {
  // Flags choose, so that what they leave out may be NaN.
  return m.flags ? (share != 0 ? before : after) : fastlstm::zoned(share, before, after);
}

}  // namespace fastlstm::FASTLSTM_ISA
