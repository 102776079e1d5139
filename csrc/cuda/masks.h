// Masks of a call (Mask in cuda/cell_kernels.h) as the kernels' threads read them, and zoneout's share of a
// state and of its gradient.
#pragma once

#include "cuda/numbers.h"

namespace fastlstm::cuda {

// Features k ... k + V - 1 of a mask in step t of row b; flags are 0 and 1.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> load_mask(const Mask& m, int d, int64_t t, int64_t b, int64_t k) {
  const int64_t at = d * m.strides[0] + t * m.strides[1] + b * m.strides[2] + k;
  if (!m.flags) return load<V>(static_cast<const T*>(m.values) + at);
  const auto flags = *reinterpret_cast<const AlignedVecN<bool, V>*>(static_cast<const bool*>(m.values) + at);
  VecN<Acc<T>, V> x;
#pragma unroll
  for (int i = 0; i < V; ++i) x.v[i] = flags.v[i] ? 1 : 0;
  return x;
}

// `after` becomes the state after the zoneout m.
template <class T, int V>
FASTLSTM_HD void zone(const Mask& m, int d, int64_t t, int64_t b, int64_t k, const VecN<Acc<T>, V>& before,
                      VecN<Acc<T>, V>& after) {
  const VecN<Acc<T>, V> share = load_mask<T, V>(m, d, t, b, k);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (!m.flags) {
      after.v[i] = zoned(share.v[i], before.v[i], after.v[i]);
    } else if (share.v[i] != 0) {  // flags select, so that what they drop may be NaN
      after.v[i] = before.v[i];
    }
  }
}

// Takes from `gradient`, that of a state after the zoneout m, the share of the state before it; returns that.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> take_share(const Mask& m, int d, int64_t t, int64_t b, int64_t k,
                                       VecN<Acc<T>, V>& gradient) {
  VecN<Acc<T>, V> share = load_mask<T, V>(m, d, t, b, k);
  scale(share, gradient);
  subtract(gradient, share);
  return share;
}

}  // namespace fastlstm::cuda
