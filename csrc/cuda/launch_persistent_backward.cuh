// Launch of the persistent backward kernel (persistent_backward.h). Included once per dtype, by separate
// files, which compile in parallel.
#pragma once

#include "cuda/group_cluster.h"
#include "cuda/group_data_flag.h"
#include "cuda/group_flags.h"
#include "cuda/group_single.h"
#include "cuda/persistent_backward.h"

namespace fastlstm::cuda {
namespace {

template <class T, int UNITS, int REGISTER_ITERS, int N_TILES, bool RAGGED>
using BackwardFlags =
    BackwardBlock<T, FlagGroup<T, UNITS, UNITS, 4 * UNITS, REGISTER_ITERS, N_TILES>, RAGGED>;
template <class T, int UNITS, int REGISTER_ITERS, bool RAGGED>
using BackwardDataFlag = BackwardBlock<T, DataFlagGroup<T, UNITS, UNITS, 4, REGISTER_ITERS>, RAGGED>;
template <class T, int N_TILES, bool RAGGED>
using BackwardCluster =
    BackwardBlock<T,
                  ReduceScatterCluster<T, kClusterUnits,
                                       cluster_register_iters(Phase::backward, sizeof(T), N_TILES), N_TILES>,
                  RAGGED>;

// Calls f with the block of the layout: the single-block or cluster variant, or a configuration of the grid
// variant (plan.h).
template <class T, bool RAGGED, class F>
auto with_backward_block(const Layout& p, F&& f) -> decltype(f(BackwardCluster<T, 1, RAGGED>())) {
  const auto is = [&](int units, int register_iters, int n_tiles) {
    return p.units == units && p.register_iters == register_iters && p.n_tiles == n_tiles;
  };
  if constexpr (sizeof(T) == 2) {
    if (p.single) return f(BackwardBlock<T, SingleBackward<T>, RAGGED>());
    if (p.cluster && p.n_tiles == 2) return f(BackwardCluster<T, 2, RAGGED>());
  }
  if (p.cluster) return f(BackwardCluster<T, 1, RAGGED>());
  if (p.data_flag && is(32, 8, 1)) return f(BackwardDataFlag<T, 32, 8, RAGGED>());
  if (p.data_flag && is(16, 16, 1)) return f(BackwardDataFlag<T, 16, 16, RAGGED>());
  if (p.data_flag) return {};
  if (is(32, 8, 1)) return f(BackwardFlags<T, 32, 8, 1, RAGGED>());
  if (is(32, 3, 2)) return f(BackwardFlags<T, 32, 3, 2, RAGGED>());
  if (is(16, 16, 1)) return f(BackwardFlags<T, 16, 16, 1, RAGGED>());
  if (is(16, 15, 2)) return f(BackwardFlags<T, 16, 15, 2, RAGGED>());
  return {};
}

}  // namespace

template <class T>
int max_resident_bwd_ctas(const Layout& p) {
  // Also the number of the ragged instantiation: one CTA per SM in both.
  return with_backward_block<T, false>(p, [&](auto block) {
    return max_resident_ctas<decltype(block), PersistentBackward<T>>(p.cluster_dim(), p.shared_bytes);
  });
}

template <class T>
cudaError_t launch_persistent_bwd(const PersistentBackward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  const auto launch = [&](auto block) {
    status = launch_persistent<decltype(block), PersistentBackward<T>>(
        s, static_cast<int>(p.ctas(s.step.D)), p.cluster_dim(), p.shared_bytes, stream);
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
  template int max_resident_bwd_ctas<T>(const Layout&); \
  template cudaError_t launch_persistent_bwd<T>(const PersistentBackward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
