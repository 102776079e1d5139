// Launch of the persistent backward kernel; a block of it is in persistent_backward.h. Included once for each
// type, by files of their own that compile side by side.
#pragma once

#include "cuda/group_cluster.h"
#include "cuda/group_flags.h"
#include "cuda/group_single.h"
#include "cuda/persistent_backward.h"

namespace fastlstm::cuda {
namespace {

template <class T, int UNITS, int HELD, int COLUMNS, bool RAGGED>
using BackwardFlags = BackwardBlock<T, FlagGroup<T, UNITS, UNITS, 4 * UNITS, HELD, COLUMNS>, RAGGED>;
template <class T, int COLUMNS, bool RAGGED>
using BackwardCluster = BackwardBlock<
    T, ScatterCluster<T, kClusterUnits, cluster_held(Phase::backward, sizeof(T), COLUMNS), COLUMNS>, RAGGED>;

// f(the layout's block): tier A's, or of tier B one of the variants in cuda/plan.h; for slices of 8 and of 16
// rows.
template <class T, bool RAGGED, class F>
auto with_backward_block(const Layout& p, F&& f) -> decltype(f(BackwardCluster<T, 1, RAGGED>())) {
  const auto is = [&](int units, int held, int columns) {
    return p.units == units && p.held == held && p.columns == columns;
  };
  if constexpr (sizeof(T) == 2) {
    if (p.single) return f(BackwardBlock<T, SingleBackward<T>, RAGGED>());
    if (p.cluster && p.columns == 2) return f(BackwardCluster<T, 2, RAGGED>());
  }
  if (p.cluster) return f(BackwardCluster<T, 1, RAGGED>());
  if (is(32, 8, 1)) return f(BackwardFlags<T, 32, 8, 1, RAGGED>());
  if (is(32, 3, 2)) return f(BackwardFlags<T, 32, 3, 2, RAGGED>());
  if (is(16, 16, 1)) return f(BackwardFlags<T, 16, 16, 1, RAGGED>());
  if (is(16, 15, 2)) return f(BackwardFlags<T, 16, 15, 2, RAGGED>());
  return {};
}

}  // namespace

template <class T>
int persistent_bwd_blocks(const Layout& p) {
  // As many of the ragged instantiation: one block an SM in both.
  return with_backward_block<T, false>(p, [&](auto block) {
    return blocks_together<decltype(block), PersistentBackward<T>>(p.in_cluster(), p.shared);
  });
}

template <class T>
cudaError_t launch_persistent_bwd(const PersistentBackward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  const auto launch = [&](auto block) {
    status = launch_together<decltype(block), PersistentBackward<T>>(s, static_cast<int>(p.blocks(s.step.D)),
                                                                     p.in_cluster(), p.shared, stream);
    return 0;
  };
  if (s.step.steps.lengths || s.step.steps.reset_mask) {
    with_backward_block<T, true>(p, launch);
  } else {
    with_backward_block<T, false>(p, launch);
  }
  return status;
}

#define FASTLSTM_PERSISTENT_BWD(T)                      \
  template int persistent_bwd_blocks<T>(const Layout&); \
  template cudaError_t launch_persistent_bwd<T>(const PersistentBackward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
