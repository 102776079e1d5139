// Tier B: a group of any number of blocks, whose states go through global memory, that is L2.
//
// A group is what a block's loop (persistent_forward.h, persistent_backward.h) is written against:
//   own(warp, slice, n, row, k)  where element k of the block's own part of state n goes
//   send(warp, slice, n)         by all warps, the block's part of state n being written
//   receive(warp, slice, n)      by all warps, before they ask for
//   sum(warp, n, row, column)    what W_hh makes of state n, for the block's own units
//   leave(warp)                  at the end
#pragma once

#include "cuda/exchange.h"
#include "cuda/resident.h"

namespace fastlstm::cuda {

// A has ROWS rows; each member's part of a state is PART elements of K.
template <class T, int UNITS, int ROWS, int PART, int HELD, int COLUMNS>
class FlagGroup {
 public:
  static constexpr bool kCluster = false;
  static constexpr int kUnits = UNITS, kSliceRows = 8 * COLUMNS;

  FASTLSTM_DEVICE FlagGroup(const Persistent& s, const Warp& warp, const Member& member)
      : s_(s), member_(member), product_(warp, s.packed, member.of_all(s.layout), s.layout.rounds, 0) {}

  FASTLSTM_DEVICE T* own(const Warp&, int slice, int n, int row, int k) const {
    return state_element<T>(slot(slice, n), product_.chunks(), row, member_.index * PART + k);
  }

  FASTLSTM_DEVICE void send(const Warp& warp, int slice, int n) const {
    publish(warp, flags(slice), member_.index, epoch(n));
  }

  FASTLSTM_DEVICE void receive(const Warp& warp, int slice, int n) {
    // The members whose parts lie in the warp's share of K.
    const int share = s_.layout.rounds * kChunkOf<T>, begin = warp.index() * share;
    const int last = (begin + share + PART - 1) / PART;
    await(warp, flags(slice), begin / PART, last < s_.layout.members ? last : s_.layout.members, epoch(n),
          s_.fault);
    product_.multiply(warp, slot(slice, n));
    warp.block_sync();
  }

  FASTLSTM_DEVICE float sum(const Warp& warp, int, int row, int column) const {
    return product_.sum(warp, row, column);
  }

  FASTLSTM_DEVICE void leave(const Warp&) const {}

 private:
  FASTLSTM_DEVICE uint32_t epoch(int n) const { return s_.epoch + 1 + static_cast<uint32_t>(n); }
  FASTLSTM_DEVICE int64_t at(int slice) const { return member_.d * s_.layout.slices + slice; }
  FASTLSTM_DEVICE uint4* slot(int slice, int n) const {
    return s_.exchange + (2 * at(slice) + epoch(n) % 2) * s_.layout.state;
  }
  FASTLSTM_DEVICE uint32_t* flags(int slice) const { return s_.flags + at(slice) * s_.layout.members; }

  const Persistent& s_;
  const Member member_;
  Gathered<T, ROWS / 16, HELD, COLUMNS, kWarps, load_published> product_;
};

}  // namespace fastlstm::cuda
