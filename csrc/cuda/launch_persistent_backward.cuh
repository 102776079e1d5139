// Launch of the persistent backward kernel; a block of it is in persistent_backward.h. Included once for each
// type, by files of their own that compile side by side.
#pragma once

#include "cuda/persistent_backward.h"

namespace fastlstm::cuda {
namespace {

// f(BackwardBlock) of the layout, one of the variants in cuda/plan.h for slices of 8 and of 16 rows.
template <class T, class F>
auto with_backward_block(const Layout& p, F&& f) -> decltype(f(BackwardBlock<T, 16, 16, 1>())) {
  const auto is = [&](int units, int held, int columns) {
    return p.units == units && p.held == held && p.columns == columns;
  };
  if (is(32, 8, 1)) return f(BackwardBlock<T, 32, 8, 1>());
  if (is(32, 5, 2)) return f(BackwardBlock<T, 32, 5, 2>());
  if (is(32, 4, 1)) return f(BackwardBlock<T, 32, 4, 1>());
  if (is(32, 4, 2)) return f(BackwardBlock<T, 32, 4, 2>());
  if (is(16, 16, 1)) return f(BackwardBlock<T, 16, 16, 1>());
  if (is(16, 16, 2)) return f(BackwardBlock<T, 16, 16, 2>());
  return {};
}

}  // namespace

template <class T>
int persistent_bwd_blocks(const Layout& p) {
  return with_backward_block<T>(
      p, [&](auto block) { return blocks_together<decltype(block), PersistentBackward<T>>(p.shared); });
}

template <class T>
cudaError_t launch_persistent_bwd(const PersistentBackward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  with_backward_block<T>(p, [&](auto block) {
    status = launch_together<decltype(block), PersistentBackward<T>>(s, p.blocks(s.step.D), p.shared, stream);
    return 0;
  });
  return status;
}

#define FASTLSTM_PERSISTENT_BWD(T)                      \
  template int persistent_bwd_blocks<T>(const Layout&); \
  template cudaError_t launch_persistent_bwd<T>(const PersistentBackward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
