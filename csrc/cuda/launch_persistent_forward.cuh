// Launch of the persistent forward kernel (persistent_forward.h). Included once per dtype, by separate files,
// which compile in parallel.
#pragma once

#include "cuda/group_cluster.h"
#include "cuda/group_data_flag.h"
#include "cuda/group_flags.h"
#include "cuda/group_single.h"
#include "cuda/persistent_forward.h"

namespace fastlstm::cuda {
namespace {

template <class T, int UNITS, int REGISTER_ITERS, int N_TILES, bool RAGGED>
using ForwardFlags =
    ForwardBlock<T, FlagGroup<T, UNITS, 4 * UNITS, UNITS, REGISTER_ITERS, N_TILES, RAGGED>, RAGGED>;
template <class T, int UNITS, int REGISTER_ITERS, bool RAGGED>
using ForwardDataFlag = ForwardBlock<T, DataFlagGroup<T, UNITS, 4 * UNITS, 1, REGISTER_ITERS>, RAGGED>;
template <class T, int N_TILES, bool RAGGED>
using ForwardCluster = ForwardBlock<
    T,
    AllGatherCluster<T, kClusterUnits, cluster_register_iters(Phase::forward, sizeof(T), N_TILES), N_TILES>,
    RAGGED>;

// Calls f with the block of the layout: the single-block or cluster variant, or a configuration of the grid
// variant (plan.h).
template <class T, bool RAGGED, class F>
auto with_forward_block(const Layout& p, F&& f) -> decltype(f(ForwardCluster<T, 1, RAGGED>())) {
  const auto is = [&](int units, int register_iters, int n_tiles) {
    return p.units == units && p.register_iters == register_iters && p.n_tiles == n_tiles;
  };
  if constexpr (sizeof(T) == 2) {
    if (p.single) return f(ForwardBlock<T, SingleForward<T>, RAGGED>());
  }
  if (p.cluster && p.n_tiles == 2) return f(ForwardCluster<T, 2, RAGGED>());
  if (p.cluster) return f(ForwardCluster<T, 1, RAGGED>());
  if (p.data_flag && is(32, 2, 1)) return f(ForwardDataFlag<T, 32, 2, RAGGED>());
  if (p.data_flag && is(16, 3, 1)) return f(ForwardDataFlag<T, 16, 3, RAGGED>());
  if (p.data_flag) return {};
  if (is(32, 2, 1)) return f(ForwardFlags<T, 32, 2, 1, RAGGED>());
  if (is(32, 1, 2)) return f(ForwardFlags<T, 32, 1, 2, RAGGED>());
  if (is(16, 3, 1)) return f(ForwardFlags<T, 16, 3, 1, RAGGED>());
  if (is(16, 3, 2)) return f(ForwardFlags<T, 16, 3, 2, RAGGED>());
  return {};
}

}  // namespace

template <class T>
int max_resident_fwd_ctas(const Layout& p) {
  // Also the number of the ragged instantiation: one CTA per SM in both.
  return with_forward_block<T, false>(p, [&](auto block) {
    return max_resident_ctas<decltype(block), PersistentForward<T>>(p.cluster_dim(), p.shared_bytes);
  });
}

template <class T>
cudaError_t launch_persistent_fwd(const PersistentForward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  const auto launch = [&](auto block) {
    status = launch_persistent<decltype(block), PersistentForward<T>>(
        s, static_cast<int>(p.ctas(s.step.D)), p.cluster_dim(), p.shared_bytes, stream);
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
  template int max_resident_fwd_ctas<T>(const Layout&); \
  template cudaError_t launch_persistent_fwd<T>(const PersistentForward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
