// One block is a group: W_hh of a layer of up to 128 units, in 16 bits, is in the registers of one block, and
// nothing is exchanged. What a group gives to a block's loop is written in group_flags.h.
//
// Each warp multiplies all of K for its 16 units, so its accumulators are the sums: forward's four tiles are
// the four gates of the same units, and a lane has all gates of its elements. A step has one barrier, between
// the writing of a state and its reading; two slots, since a warp may write state n + 1 while another still
// reads state n.
#pragma once

#include "cuda/resident.h"

namespace fastlstm::cuda {

// The elements whose sums are in the lane's own accumulators: units lane / 4 and lane / 4 + 8 of the
// warp's 16. A slice has four rows, in the even ones of a tile's 8 columns, so that a lane has one of its two
// neighbouring columns: eight rows would be four elements a thread, for which there are no registers.
struct DealOfAccumulators {
  static constexpr int kElements = 2;

  static FASTLSTM_DEVICE Element element(const Warp& warp, int lane, int q, int member, int slice, int64_t H,
                                         int64_t B) {
    const unsigned of_lane = static_cast<unsigned>(lane);
    const int unit = warp.index() * 16 + static_cast<int>(of_lane / 4) + 8 * q;
    return {unit, static_cast<int>(of_lane % 4), kSingleUnits, kSingleRows, member, slice, H, B};
  }
  // Which of an accumulator's four numbers element q is.
  static FASTLSTM_DEVICE float of(const float4& acc, int q) { return q == 0 ? acc.x : acc.z; }
};

// Forward: TILES 4, the gates, and K = H. Backward: one tile of dh, K = 4H in CHAINS sums, so that fewer
// products wait for one another. ROUNDS chunks of K.
template <class T, int TILES, int ROUNDS, int CHAINS>
class SingleGroup {
 public:
  static constexpr bool kCluster = false;
  static constexpr int kUnits = kSingleUnits, kSliceRows = kSingleRows;
  using Elements = DealOfAccumulators;
  using Place = int;  // an element of shared memory

  FASTLSTM_DEVICE SingleGroup(const Persistent& s, const Warp& warp, const Member& member)
      : a_(warp, s.packed, member.d, ROUNDS, 0) {
    for (const int lane : warp.lanes()) {
      for (int i = warp.index() * 32 + lane; i < 2 * kWords; i += kWarps * 32)
        warp.shared()[i] = {0, 0, 0, 0};
    }
    warp.block_sync();
  }

  FASTLSTM_DEVICE void bind(const Warp&, int, int n) {
    read_ = keep(static_cast<unsigned>(n) % 2 == 0 ? 0 : kWords);
  }
  FASTLSTM_DEVICE void advance(const Warp&) { read_ = kWords - read_; }

  FASTLSTM_DEVICE Place place(const Warp&, int row, int k) const {
    return (kWords - read_) * kOfWord + state_offset<T>(ROUNDS, 2 * row, k);
  }
  FASTLSTM_DEVICE static T* own(const Warp& warp, Place place) {
    return reinterpret_cast<T*>(warp.shared()) + place;
  }
  FASTLSTM_DEVICE Place before(Place place) const { return place - (kWords - 2 * read_) * kOfWord; }
  FASTLSTM_DEVICE Place flip(Place place) const { return before(place); }

  FASTLSTM_DEVICE void send(const Warp&) const {}

  FASTLSTM_DEVICE void receive(const Warp& warp) {
#pragma unroll
    for (int i = 0; i < TILES * CHAINS; ++i) {
      for (const int lane : warp.lanes()) acc_[i][lane] = {0, 0, 0, 0};
    }
#pragma unroll
    for (int k = 0; k < ROUNDS; ++k) {
      PerLane<uint4> b;
      for (const int lane : warp.lanes()) b[lane] = warp.shared()[read_ + k * 32 + lane];
#pragma unroll
      for (int r = 0; r < TILES; ++r) {
        multiply_chunk<T>(acc_[k % CHAINS * TILES + r], a_.held[k][2 * r], a_.held[k][2 * r + 1], b);
      }
    }
  }

  FASTLSTM_DEVICE int sum_at(int, int) const { return 0; }
  FASTLSTM_DEVICE float sum(const Warp&, int lane, int q, int) const { return tile(lane, q, 0); }
  FASTLSTM_DEVICE float4 sum4(const Warp&, int lane, int q, int) const {
    return {tile(lane, q, 0), tile(lane, q, 1), tile(lane, q, 2), tile(lane, q, 3)};
  }

  FASTLSTM_DEVICE void leave(const Warp&) const {}

 private:
  static constexpr int kOfWord = 16 / static_cast<int>(sizeof(T)), kWords = ROUNDS * 32;  // of a slot

  FASTLSTM_DEVICE float tile(int lane, int q, int r) const {
    float total = Elements::of(acc_[r][lane], q);
#pragma unroll
    for (int i = 1; i < CHAINS; ++i) total += Elements::of(acc_[i * TILES + r][lane], q);
    return total;
  }

  Resident<TILES, ROUNDS> a_;
  PerLane<float4> acc_[TILES * CHAINS];
  int read_ = 0;  // the first word of the slot of state n
};

template <class T>
using SingleForward = SingleGroup<T, 4, kSingleForwardRounds, 1>;
template <class T>
using SingleBackward = SingleGroup<T, 1, kSingleBackwardRounds, 2>;

}  // namespace fastlstm::cuda
