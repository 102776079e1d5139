// Launch of the persistent backward kernel; a block of it is in persistent_backward.h. Included once for each
// type, by files of their own that compile side by side.
#pragma once

#include "cuda/group_cluster.h"
#include "cuda/group_flags.h"
#include "cuda/persistent_backward.h"

namespace fastlstm::cuda {
namespace {

template <class T, int UNITS, int HELD, int COLUMNS>
using BackwardFlags = BackwardBlock<T, FlagGroup<T, UNITS, UNITS, 4 * UNITS, HELD, COLUMNS>>;
template <class T, int COLUMNS>
using BackwardCluster = BackwardBlock<
    T, ScatterCluster<T, kClusterUnits, cluster_held(Phase::backward, sizeof(T), COLUMNS), COLUMNS>>;

// f(the layout's block): tier A's, or of tier B one of the variants in cuda/plan.h; for slices of 8 and of 16
// rows.
template <class T, class F>
auto with_backward_block(const Layout& p, F&& f) -> decltype(f(BackwardCluster<T, 1>())) {
  const auto is = [&](int units, int held, int columns) {
    return p.units == units && p.held == held && p.columns == columns;
  };
  if constexpr (sizeof(T) == 2) {
    if (p.cluster && p.columns == 2) return f(BackwardCluster<T, 2>());
  }
  if (p.cluster) return f(BackwardCluster<T, 1>());
  if (is(32, 8, 1)) return f(BackwardFlags<T, 32, 8, 1>());
  if (is(32, 3, 2)) return f(BackwardFlags<T, 32, 3, 2>());
  if (is(16, 16, 1)) return f(BackwardFlags<T, 16, 16, 1>());
  if (is(16, 16, 2)) return f(BackwardFlags<T, 16, 16, 2>());
  return {};
}

}  // namespace

template <class T>
int persistent_bwd_blocks(const Layout& p) {
  return with_backward_block<T>(p, [&](auto block) {
    return blocks_together<decltype(block), PersistentBackward<T>>(p.in_cluster(), p.shared);
  });
}

template <class T>
cudaError_t launch_persistent_bwd(const PersistentBackward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  with_backward_block<T>(p, [&](auto block) {
    status = launch_together<decltype(block), PersistentBackward<T>>(s, static_cast<int>(p.blocks(s.step.D)),
                                                                     p.in_cluster(), p.shared, stream);
    return 0;
  });
  return status;
}

#define FASTLSTM_PERSISTENT_BWD(T)                      \
  template int persistent_bwd_blocks<T>(const Layout&); \
  template cudaError_t launch_persistent_bwd<T>(const PersistentBackward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
