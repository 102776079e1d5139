// Single-block variant: a group is one CTA, whose registers hold W_hh of a layer of up to 128 units in 16
// bits; nothing is exchanged. The interface of a group is described in group_flags.h.
//
// Each warp multiplies all of K for its 16 units, so its accumulators are the sums: in forward the four m
// tiles are the four gates of these units, and a lane has all gates of its elements. A step has one barrier,
// between the writes and the reads of a state. Two slots, because a warp may write state n + 1 while another
// reads state n.
#pragma once

#include "cuda/resident.h"

namespace fastlstm::cuda {

// Maps a lane to the elements whose sums are in its accumulators: units lane / 4 and lane / 4 + 8 of the
// warp's
// 16. A batch tile has four rows, in the even columns of the n tile, so a lane uses one of its two columns:
// eight rows would be four elements per thread, and there are no registers for four.
struct AccumulatorElementMap {
  static constexpr int kElements = 2;

  static FASTLSTM_DEVICE Element element(const Warp& warp, int lane, int q, int cta_rank, int batch_tile,
                                         int64_t H, int64_t B) {
    const auto l = static_cast<unsigned>(lane);
    const int unit = warp.index() * 16 + static_cast<int>(l / 4) + 8 * q;
    return {unit, static_cast<int>(l % 4), kSingleUnits, kSingleRows, cta_rank, batch_tile, H, B};
  }
  // Element q's component of an accumulator.
  static FASTLSTM_DEVICE float of(const float4& acc, int q) { return q == 0 ? acc.x : acc.z; }
};

// Forward: four m tiles, the gates, and K = H. Backward: one m tile of dh and K = 4H, in CHAINS independent
// accumulators, so that fewer mma.sync wait for each other. ITERS: K slices.
template <class T, int M_TILES, int ITERS, int CHAINS>
class SingleGroup {
 public:
  static constexpr bool kCluster = false, kDataFlag = false;
  static constexpr int kUnits = kSingleUnits, kBatchTileRows = kSingleRows;
  using Elements = AccumulatorElementMap;
  using StateAddress = int;  // index of an element in shared memory

  FASTLSTM_DEVICE SingleGroup(const Persistent& s, const Warp& warp, const CtaCoord& cta)
      : a_(warp, s.packed_weights, cta.d, ITERS, 0) {
    for (const int lane : warp.lanes()) {
      for (int i = warp.index() * 32 + lane; i < 2 * kSlotWords; i += kWarps * 32)
        warp.shared()[i] = {0, 0, 0, 0};
    }
    warp.block_sync();
  }

  FASTLSTM_DEVICE void bind(const Warp&, int, int n) {
    read_ = keep_in_register(static_cast<unsigned>(n) % 2 == 0 ? 0 : kSlotWords);
  }
  FASTLSTM_DEVICE void advance(const Warp&) { read_ = kSlotWords - read_; }

  FASTLSTM_DEVICE StateAddress address(const Warp&, int row, int k) const {
    return (kSlotWords - read_) * kWordElements + state_offset<T>(ITERS, 2 * row, k);
  }
  FASTLSTM_DEVICE static T* pointer(const Warp& warp, StateAddress address) {
    return reinterpret_cast<T*>(warp.shared()) + address;
  }
  FASTLSTM_DEVICE StateAddress previous(StateAddress address) const {
    return address - (kSlotWords - 2 * read_) * kWordElements;
  }
  FASTLSTM_DEVICE StateAddress next(StateAddress address) const { return previous(address); }

  FASTLSTM_DEVICE void send(const Warp&) const {}

  FASTLSTM_DEVICE void receive(const Warp& warp) {
#pragma unroll
    for (int i = 0; i < M_TILES * CHAINS; ++i) {
      for (const int lane : warp.lanes()) acc_[i][lane] = {0, 0, 0, 0};
    }
#pragma unroll
    for (int k = 0; k < ITERS; ++k) {
      PerLane<uint4> b;
      for (const int lane : warp.lanes()) b[lane] = warp.shared()[read_ + k * 32 + lane];
#pragma unroll
      for (int r = 0; r < M_TILES; ++r) {
        mma_k_slice<T>(acc_[k % CHAINS * M_TILES + r], a_.fragments[k][2 * r], a_.fragments[k][2 * r + 1], b);
      }
    }
  }

  FASTLSTM_DEVICE int sum_offset(int, int) const { return 0; }
  FASTLSTM_DEVICE float sum(const Warp&, int lane, int q, int) const { return tile(lane, q, 0); }
  FASTLSTM_DEVICE float4 sum4(const Warp&, int lane, int q, int) const {
    return {tile(lane, q, 0), tile(lane, q, 1), tile(lane, q, 2), tile(lane, q, 3)};
  }

  FASTLSTM_DEVICE void leave(const Warp&) const {}

 private:
  static constexpr int kWordElements = 16 / static_cast<int>(sizeof(T)), kSlotWords = ITERS * 32;

  FASTLSTM_DEVICE float tile(int lane, int q, int r) const {
    float total = Elements::of(acc_[r][lane], q);
#pragma unroll
    for (int i = 1; i < CHAINS; ++i) total += Elements::of(acc_[i * M_TILES + r][lane], q);
    return total;
  }

  ResidentWeights<M_TILES, ITERS> a_;
  PerLane<float4> acc_[M_TILES * CHAINS];
  int read_ = 0;  // first word of the slot of state n
};

template <class T>
using SingleForward = SingleGroup<T, 4, kSingleForwardIters, 1>;
template <class T>
using SingleBackward = SingleGroup<T, 1, kSingleBackwardIters, 2>;

}  // namespace fastlstm::cuda
