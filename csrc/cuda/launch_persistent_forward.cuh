// Launch of the persistent forward kernel; a block of it is in persistent_forward.h. Included once for each
// type, by files of their own that compile side by side.
#pragma once

#include "cuda/group_cluster.h"
#include "cuda/group_flags.h"
#include "cuda/persistent_forward.h"

namespace fastlstm::cuda {
namespace {

template <class T, int UNITS, int HELD, int COLUMNS>
using ForwardFlags = ForwardBlock<T, FlagGroup<T, UNITS, 4 * UNITS, UNITS, HELD, COLUMNS>>;
template <class T, int COLUMNS>
using ForwardCluster =
    ForwardBlock<T,
                 GatherCluster<T, kClusterUnits, cluster_held(Phase::forward, sizeof(T), COLUMNS), COLUMNS>>;

// f(the layout's block): tier A's, or of tier B one of the variants in cuda/plan.h; for slices of 8 and of 16
// rows.
template <class T, class F>
auto with_forward_block(const Layout& p, F&& f) -> decltype(f(ForwardCluster<T, 1>())) {
  const auto is = [&](int units, int held, int columns) {
    return p.units == units && p.held == held && p.columns == columns;
  };
  if (p.cluster && p.columns == 2) return f(ForwardCluster<T, 2>());
  if (p.cluster) return f(ForwardCluster<T, 1>());
  if (is(32, 2, 1)) return f(ForwardFlags<T, 32, 2, 1>());
  if (is(32, 1, 2)) return f(ForwardFlags<T, 32, 1, 2>());
  if (is(16, 3, 1)) return f(ForwardFlags<T, 16, 3, 1>());
  if (is(16, 3, 2)) return f(ForwardFlags<T, 16, 3, 2>());
  return {};
}

}  // namespace

template <class T>
int persistent_fwd_blocks(const Layout& p) {
  return with_forward_block<T>(p, [&](auto block) {
    return blocks_together<decltype(block), PersistentForward<T>>(p.in_cluster(), p.shared);
  });
}

template <class T>
cudaError_t launch_persistent_fwd(const PersistentForward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  with_forward_block<T>(p, [&](auto block) {
    status = launch_together<decltype(block), PersistentForward<T>>(s, static_cast<int>(p.blocks(s.step.D)),
                                                                    p.in_cluster(), p.shared, stream);
    return 0;
  });
  return status;
}

#define FASTLSTM_PERSISTENT_FWD(T)                      \
  template int persistent_fwd_blocks<T>(const Layout&); \
  template cudaError_t launch_persistent_fwd<T>(const PersistentForward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
