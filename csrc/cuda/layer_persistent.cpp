#include "cuda/layer_persistent.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "cuda/device.h"

namespace fastlstm::cuda {
namespace {

// The most blocks of a layout's kernel that can be on the current device at once. Asking the runtime takes
// some microseconds, and its answer is the same in every call.
template <class T>
int64_t max_blocks(Phase phase, const Layout& p, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Phase, int, int, int, int, int64_t>, int> known;
  const auto key = std::make_tuple(device, phase, p.units, p.held, p.columns, p.in_cluster(), p.shared);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  const int blocks = phase == Phase::forward ? persistent_fwd_blocks<T>(p) : persistent_bwd_blocks<T>(p);
  if (blocks > 0) known.emplace(key, blocks);
  return blocks;
}

}  // namespace

template <class T>
PersistentPass<T>::PersistentPass(const Layer& l, Phase phase, bool tf32, cudaStream_t stream)
    : stream_(stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!persistent_enabled || !supports_steps(l.T)) return;
    const int element = std::is_same_v<T, float> && !tf32 ? 0 : static_cast<int>(c10::elementSize(l.dtype));
    const int D = static_cast<int>(l.D);
    const Recurrence r = {l.H, l.P, l.B, D, element};
    DeviceLimits device = device_limits();
    Plan found = plan(phase, r, device, persistent_tier);
    const auto room = [&] { return max_blocks<T>(phase, found.layout, l.options.device().index()); };
    if (found.layout.cluster) {
      // How many clusters there is room for depends on where the device's SMs lie, which the runtime knows.
      device.clusters = static_cast<int>(room() / found.layout.members);
      found = plan(phase, r, device, persistent_tier);
    }
    if (!found.reason.empty()) return;
    // Fewer where the process is limited to a part of the device.
    if (room() < (found.layout.in_cluster() == 0 ? found.layout.blocks(D) : 1)) return;
    layout_ = found.layout;

    PackWeights<T> pack = {layout_, phase, l.H, D};
    for (int d = 0; d < D; ++d) {
      const at::Tensor& w = l.weights[d].hh;
      pack.w_hh[d] = in<T>(w), pack.row[d] = w.stride(0), pack.column[d] = w.stride(1);
    }
    packed_ = at::empty({16 * pack.words()}, l.options.dtype(at::kByte));
    pack.packed = out<uint4>(packed_);
    check(launch_pack_weights(pack, stream));
    // What goes through global memory.
    const int64_t slices = layout_.in_cluster() == 0 ? l.D * layout_.slices : 0;
    flags_at_ = slices * 2 * layout_.state * 4, fault_at_ = flags_at_ + slices * layout_.members;
    exchange_ = at::zeros({fault_at_ + 1}, l.options.dtype(at::kInt));
  }
}

template <class T>
Persistent PersistentPass<T>::next(int64_t begin, int64_t count, const int64_t (&slot_t)[2]) {
  Persistent s = {};
  s.layout = layout_, s.packed = in<uint4>(packed_), s.exchange = out<uint4>(exchange_);
  uint32_t* const words = out<uint32_t>(exchange_);
  s.flags = words + flags_at_, s.fault = words + fault_at_;
  s.epoch = epoch_, s.begin = begin, s.count = static_cast<int>(count);
  s.slot_t[0] = slot_t[0], s.slot_t[1] = slot_t[1];
  epoch_ += static_cast<uint32_t>(count);
  return s;
}

template <class T>
bool PersistentPass<T>::launched(cudaError_t status) {
  if (status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorInvalidClusterSize) {
    packed_ = at::Tensor();
    return false;
  }
  check(status);
  return true;
}

template <class T>
bool PersistentPass<T>::forward(const ForwardStep<T>& step, int64_t begin, int64_t count,
                                const int64_t (&slot_t)[2]) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    return launched(launch_persistent_fwd<T>({next(begin, count, slot_t), step}, stream_));
  }
}

template <class T>
bool PersistentPass<T>::backward(const BackwardStep<T>& step, int64_t begin, int64_t count,
                                 const int64_t (&slot_t)[2], Acc<T>* dh) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    return launched(launch_persistent_bwd<T>({next(begin, count, slot_t), step, dh}, stream_));
  }
}

template class PersistentPass<float>;
template class PersistentPass<double>;
template class PersistentPass<__half>;
template class PersistentPass<__nv_bfloat16>;

}  // namespace fastlstm::cuda
