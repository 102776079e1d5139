#include "cuda/layer_persistent.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>
#include <type_traits>

#include "cuda/device.h"

namespace fastlstm::cuda {

template <class T>
PersistentPass<T>::PersistentPass(const Layer& l, Phase phase, bool tf32, cudaStream_t stream)
    : stream_(stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!persistent_enabled || l.T < kLeastSteps) return;
    const int element = std::is_same_v<T, float> && !tf32 ? 0 : static_cast<int>(c10::elementSize(l.dtype));
    const int D = static_cast<int>(l.D);
    const Recurrence r = {l.H, l.P, l.B, D, element};
    DeviceLimits device = device_limits();
    Plan found = plan(phase, r, device, persistent_tier);
    const auto most = [&] {
      return phase == Phase::forward ? persistent_fwd_blocks<T>(found.layout)
                                     : persistent_bwd_blocks<T>(found.layout);
    };
    if (found.layout.cluster) {
      // How many clusters there is room for depends on where the device's SMs lie, which the runtime knows.
      device.clusters = most() / found.layout.members;
      found = plan(phase, r, device, persistent_tier);
    }
    if (!found.reason.empty()) return;
    // Fewer where the process is limited to a part of the device.
    if (!found.layout.cluster && most() < found.layout.blocks(D)) return;
    layout_ = found.layout;

    PackWeights<T> pack = {layout_, phase, l.H, D};
    for (int d = 0; d < D; ++d) {
      const at::Tensor& w = l.weights[d].hh;
      pack.w_hh[d] = in<T>(w), pack.row[d] = w.stride(0), pack.column[d] = w.stride(1);
    }
    packed_ = at::empty({16 * pack.words()}, l.options.dtype(at::kByte));
    pack.packed = out<uint4>(packed_);
    check(launch_pack_weights(pack, stream));
    const int64_t slices = layout_.cluster ? 0 : l.D * layout_.slices;  // in global memory
    exchange_ = at::zeros({slices * 2 * layout_.state * 16}, l.options.dtype(at::kByte));
    flags_ = at::zeros({slices * layout_.members + 1}, l.options.dtype(at::kInt));
  }
}

template <class T>
Persistent PersistentPass<T>::next(int64_t begin, int64_t count, const int64_t (&slot_t)[2]) {
  TORCH_CHECK(count < std::numeric_limits<int>::max() - static_cast<int64_t>(epoch_),
              "the persistent kernels take fewer than 2^31 steps, got ", begin + count);
  Persistent s = {};
  s.layout = layout_, s.packed = in<uint4>(packed_), s.exchange = out<uint4>(exchange_);
  s.flags = out<uint32_t>(flags_), s.fault = s.flags + flags_.numel() - 1;
  s.epoch = epoch_, s.begin = begin, s.count = static_cast<int>(count);
  s.slot_t[0] = slot_t[0], s.slot_t[1] = slot_t[1];
  epoch_ += static_cast<uint32_t>(count);
  return s;
}

template <class T>
void PersistentPass<T>::forward(const ForwardStep<T>& step, int64_t begin, int64_t count,
                                const int64_t (&slot_t)[2]) {
  if constexpr (!std::is_same_v<T, double>) {
    check(launch_persistent_fwd<T>({next(begin, count, slot_t), step}, stream_));
  }
}

template <class T>
void PersistentPass<T>::backward(const BackwardStep<T>& step, int64_t begin, int64_t count,
                                 const int64_t (&slot_t)[2], Acc<T>* dh) {
  if constexpr (!std::is_same_v<T, double>) {
    check(launch_persistent_bwd<T>({next(begin, count, slot_t), step, dh}, stream_));
  }
}

template class PersistentPass<float>;
template class PersistentPass<double>;
template class PersistentPass<__half>;
template class PersistentPass<__nv_bfloat16>;

}  // namespace fastlstm::cuda
