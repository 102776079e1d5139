#include "cuda/layer_persistent.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "cuda/device.h"

namespace fastlstm::cuda {
namespace {

// Max resident CTAs of a layout's kernel on the current device. Cached: a query of the runtime takes some
// microseconds.
template <class T>
int64_t max_ctas(Phase phase, const Layout& p, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<int, Phase, bool, int, int, int, int, int64_t>, int> cache;
  const auto key = std::make_tuple(device, phase, p.data_flag, p.units, p.register_iters, p.n_tiles,
                                   p.cluster_dim(), p.shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto entry = cache.find(key); entry != cache.end()) return entry->second;
  const int ctas = phase == Phase::forward ? max_resident_fwd_ctas<T>(p) : max_resident_bwd_ctas<T>(p);
  if (ctas > 0) cache.emplace(key, ctas);
  return ctas;
}

}  // namespace

template <class T>
PersistentPass<T>::PersistentPass(const Layer& l, Phase phase, bool tf32, cudaStream_t stream)
    : stream_(stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (!persistent_enabled || !supports_steps(l.T) || l.masked() || l.norm) return;
    const int element_bytes =
        std::is_same_v<T, float> && !tf32 ? 0 : static_cast<int>(c10::elementSize(l.dtype));
    const int D = static_cast<int>(l.D);
    const Recurrence r = {l.H, l.P, l.B, D, element_bytes};
    DeviceLimits device = device_limits();
    PersistentPlan chosen = plan(phase, r, device, persistent_tier);
    const auto resident = [&] { return max_ctas<T>(phase, chosen.layout, l.options.device().index()); };
    if (chosen.layout.cluster) {
      // How many clusters fit depends on the GPCs of the device's SMs; only the runtime knows.
      device.resident_clusters = static_cast<int>(resident() / chosen.layout.ctas_per_group);
      chosen = plan(phase, r, device, persistent_tier);
    }
    if (!chosen.reason.empty()) return;
    // Fewer if the process is limited to a part of the device.
    if (resident() < (chosen.layout.cluster_dim() == 0 ? chosen.layout.ctas(D) : 1)) return;
    layout_ = chosen.layout;

    PackWeights<T> pack = {layout_, phase, l.H, D};
    for (int d = 0; d < D; ++d) {
      const at::Tensor& w = l.weights[d].hh;
      pack.w_hh[d] = in<T>(w), pack.row_stride[d] = w.stride(0), pack.column_stride[d] = w.stride(1);
    }
    packed_weights_ = at::empty({16 * pack.words()}, l.options.dtype(at::kByte));
    pack.packed_weights = out<uint4>(packed_weights_);
    check(launch_pack_weights(pack, stream));
    // Grid variant: states and flags in global memory.
    const int64_t batch_tiles = layout_.cluster_dim() == 0 ? l.D * layout_.batch_tiles : 0;
    flags_offset_ = batch_tiles * layout_.exchange_slots() * layout_.state_words * 4;
    fault_offset_ = flags_offset_ + (layout_.data_flag ? 0 : batch_tiles * layout_.ctas_per_group);
    // In a CUDA graph this fill is a node before the launches, so a replay begins with an empty buffer too.
    const int fill = layout_.data_flag ? static_cast<int>(kEmptyWord) : 0;
    exchange_ = at::full({fault_offset_ + 1}, fill, l.options.dtype(at::kInt));
  }
}

template <class T>
Persistent PersistentPass<T>::next(int64_t begin, int64_t count, const int64_t (&slot_t)[2]) {
  Persistent s = {};
  s.layout = layout_, s.packed_weights = in<uint4>(packed_weights_), s.exchange = out<uint4>(exchange_);
  uint32_t* const words = out<uint32_t>(exchange_);
  s.flags = words + flags_offset_, s.fault = words + fault_offset_;
  s.epoch = epoch_, s.begin = begin, s.count = static_cast<int>(count);
  s.slot_t[0] = slot_t[0], s.slot_t[1] = slot_t[1];
  epoch_ += static_cast<uint32_t>(count);
  return s;
}

template <class T>
bool PersistentPass<T>::launched(cudaError_t status) {
  if (status == cudaErrorCooperativeLaunchTooLarge || status == cudaErrorInvalidClusterSize) {
    packed_weights_ = at::Tensor();
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
