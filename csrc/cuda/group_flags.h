// Tier B: a group of any number of blocks, whose states go through global memory, that is L2.
//
// A group is what a block's loop (persistent_forward.h, persistent_backward.h) is written against. It is
// bound to a slice and a state n, which it receives, and whose successor the block makes. Binding computes
// all addresses, so that none is computed between the arrival of a state and the sending of the next:
//   bind(warp, slice, n)    sets both; n = -1 where there is no state yet to be received
//   advance(warp)           to the next state
//   receive(warp)           by all warps: waits for state n and multiplies W_hh by it
//   sum_at(row, column)     where sum and sum4 find that element of the product
//   sum(warp, lane, q, at)  what W_hh makes of state n for the lane's element q; at: sum_at's
//   sum4(warp, lane, q, at) the same of four rows, a unit's gates
//   place(warp, row, k)     of element k of the block's own part of state n + 1
//   own(warp, place)        points there
//   flip(place)             the same of state n + 2, before advance()
//   before(place)           the same of state n
//   send(warp)              by all warps, after a block_sync that follows what they wrote of state n + 1
//   leave(warp)             at the end
// Elements deals the elements of a slice to threads.
#pragma once

#include "cuda/exchange.h"
#include "cuda/resident.h"

namespace fastlstm::cuda {

// A has ROWS rows; each member's part of a state is PART elements of K.
template <class T, int UNITS, int ROWS, int PART, int HELD, int COLUMNS, bool TIGHT = true>
class FlagGroup {
 public:
  static constexpr bool kCluster = false;
  static constexpr int kUnits = UNITS, kSliceRows = 8 * COLUMNS;
  using Elements = Deal<UNITS, 8 * COLUMNS>;
  using Place = T*;

  FASTLSTM_DEVICE FlagGroup(const Persistent& s, const Warp& warp, const Member& member)
      : s_(s), member_(member), product_(warp, s.packed, member.of_all(s.layout), s.layout.rounds, 0) {}

  FASTLSTM_DEVICE void bind(const Warp& warp, int slice, int n) {
    const Layout& p = s_.layout;
    const int64_t at = int64_t{member_.d} * p.slices + slice;
    epoch_ = s_.epoch + 1 + static_cast<uint32_t>(n);
    state_ = s_.exchange + (2 * at + epoch_ % 2) * p.state;
    other_ = static_cast<int>(epoch_ % 2 == 0 ? p.state : -p.state);
    uint32_t* const flags = s_.flags + at * p.members;
    own_flag_ = flags + member_.index;
    // The members whose parts lie in the warp's share of K.
    const int share = p.rounds * kChunkOf<T>, begin = warp.index() * share;
    const int first = begin / PART, end = (begin + share + PART - 1) / PART;
    for (const int lane : warp.lanes()) {
      flag_[lane] = first + lane < (end < p.members ? end : p.members) ? flags + first + lane : nullptr;
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) from_[c][lane] = state_ + product_.first_word(warp, lane, c);
    }
  }

  FASTLSTM_DEVICE void advance(const Warp& warp) {
    ++epoch_;
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) from_[c][lane] += other_;
    }
    state_ += other_;
    other_ = -other_;
  }

  FASTLSTM_DEVICE Place place(const Warp&, int row, int k) const {
    return reinterpret_cast<T*>(state_ + other_) +
           state_offset<T>(product_.chunks(), row, member_.index * PART + k);
  }
  FASTLSTM_DEVICE static T* own(const Warp&, Place place) { return place; }
  FASTLSTM_DEVICE Place before(Place place) const {
    return place - int64_t{other_} * (16 / static_cast<int>(sizeof(T)));
  }
  FASTLSTM_DEVICE Place flip(Place place) const { return before(place); }

  FASTLSTM_DEVICE void send(const Warp& warp) const { publish(warp, own_flag_, epoch_ + 1); }

  FASTLSTM_DEVICE void receive(const Warp& warp) {
    await(warp, flag_, epoch_, s_.fault);
    product_.multiply(warp, from_);
    warp.block_sync();
  }

  FASTLSTM_DEVICE int sum_at(int row, int column) const { return product_.sum_at(row, column); }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int at) const { return product_.sum(warp, at); }
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int, int, int at) const { return product_.sum4(warp, at); }

  FASTLSTM_DEVICE void leave(const Warp&) const {}

 protected:  // benchmarks/cuda/steps.cu leaves out stages
  const Persistent& s_;
  const Member member_;
  Gathered<T, ROWS / 16, HELD, COLUMNS, kWarps, TIGHT, load_published> product_;
  uint32_t epoch_;                       // of state n
  uint4* state_;                         // the slot of state n
  int other_;                            // words from there to the other slot
  PerLane<const uint4*> from_[COLUMNS];  // what the lane loads of state n
  PerLane<const uint32_t*> flag_;        // that the lane polls
  uint32_t* own_flag_;
};

}  // namespace fastlstm::cuda
