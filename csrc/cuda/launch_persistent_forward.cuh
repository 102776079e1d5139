// Launch of the persistent forward kernel; a block of it is in persistent_forward.h. Included once for each
// type, by files of their own that compile side by side.
#pragma once

#include "cuda/group_cluster.h"
#include "cuda/group_flags.h"
#include "cuda/group_single.h"
#include "cuda/persistent_forward.h"

namespace fastlstm::cuda {
namespace {

template <class T, int UNITS, int HELD, int COLUMNS, bool RAGGED>
using ForwardFlags = ForwardBlock<T, FlagGroup<T, UNITS, 4 * UNITS, UNITS, HELD, COLUMNS, RAGGED>, RAGGED>;
template <class T, int COLUMNS, bool RAGGED>
using ForwardCluster = ForwardBlock<
    T, GatherCluster<T, kClusterUnits, cluster_held(Phase::forward, sizeof(T), COLUMNS), COLUMNS>, RAGGED>;

// f(the layout's block): tier A's, or of tier B one of the variants in cuda/plan.h; for slices of 8 and of 16
// rows.
template <class T, bool RAGGED, class F>
auto with_forward_block(const Layout& p, F&& f) -> decltype(f(ForwardCluster<T, 1, RAGGED>())) {
  const auto is = [&](int units, int held, int columns) {
    return p.units == units && p.held == held && p.columns == columns;
  };
  if constexpr (sizeof(T) == 2) {
    if (p.single) return f(ForwardBlock<T, SingleForward<T>, RAGGED>());
  }
  if (p.cluster && p.columns == 2) return f(ForwardCluster<T, 2, RAGGED>());
  if (p.cluster) return f(ForwardCluster<T, 1, RAGGED>());
  if (is(32, 2, 1)) return f(ForwardFlags<T, 32, 2, 1, RAGGED>());
  if (is(32, 1, 2)) return f(ForwardFlags<T, 32, 1, 2, RAGGED>());
  if (is(16, 3, 1)) return f(ForwardFlags<T, 16, 3, 1, RAGGED>());
  if (is(16, 3, 2)) return f(ForwardFlags<T, 16, 3, 2, RAGGED>());
  return {};
}

}  // namespace

template <class T>
int persistent_fwd_blocks(const Layout& p) {
  // As many of the ragged instantiation: one block an SM in both.
  return with_forward_block<T, false>(p, [&](auto block) {
    return blocks_together<decltype(block), PersistentForward<T>>(p.in_cluster(), p.shared);
  });
}

template <class T>
cudaError_t launch_persistent_fwd(const PersistentForward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  const auto launch = [&](auto block) {
    status = launch_together<decltype(block), PersistentForward<T>>(s, static_cast<int>(p.blocks(s.step.D)),
                                                                    p.in_cluster(), p.shared, stream);
    return 0;
  };
  if (s.step.steps.lengths || s.step.steps.reset_mask) {
    with_forward_block<T, true>(p, launch);
  } else {
    with_forward_block<T, false>(p, launch);
  }
  return status;
}

#define FASTLSTM_PERSISTENT_FWD(T)                      \
  template int persistent_fwd_blocks<T>(const Layout&); \
  template cudaError_t launch_persistent_fwd<T>(const PersistentForward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
