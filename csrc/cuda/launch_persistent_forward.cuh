// Launch of the persistent forward kernel; a block of it is in persistent_forward.h. Included once for each
// type, by files of their own that compile side by side.
#pragma once

#include "cuda/persistent_forward.h"

namespace fastlstm::cuda {
namespace {

// f(ForwardBlock) of the layout, one of the variants in cuda/plan.h for slices of 8 and of 16 rows.
template <class T, class F>
auto with_forward_block(const Layout& p, F&& f) -> decltype(f(ForwardBlock<T, 16, 4, 1>())) {
  const auto is = [&](int units, int held, int columns) {
    return p.units == units && p.held == held && p.columns == columns;
  };
  if (is(32, 2, 1)) return f(ForwardBlock<T, 32, 2, 1>());
  if (is(32, 1, 1)) return f(ForwardBlock<T, 32, 1, 1>());
  if (is(32, 1, 2)) return f(ForwardBlock<T, 32, 1, 2>());
  if (is(16, 4, 1)) return f(ForwardBlock<T, 16, 4, 1>());
  if (is(16, 4, 2)) return f(ForwardBlock<T, 16, 4, 2>());
  return {};
}

}  // namespace

template <class T>
int persistent_fwd_blocks(const Layout& p) {
  return with_forward_block<T>(
      p, [&](auto block) { return blocks_together<decltype(block), PersistentForward<T>>(p.shared); });
}

template <class T>
cudaError_t launch_persistent_fwd(const PersistentForward<T>& s, cudaStream_t stream) {
  const Layout& p = s.layout;
  cudaError_t status = cudaErrorInvalidConfiguration;
  with_forward_block<T>(p, [&](auto block) {
    status = launch_together<decltype(block), PersistentForward<T>>(s, p.blocks(s.step.D), p.shared, stream);
    return 0;
  });
  return status;
}

#define FASTLSTM_PERSISTENT_FWD(T)                      \
  template int persistent_fwd_blocks<T>(const Layout&); \
  template cudaError_t launch_persistent_fwd<T>(const PersistentForward<T>&, cudaStream_t);

}  // namespace fastlstm::cuda
