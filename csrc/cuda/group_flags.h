// Grid variant: a group is any set of CTAs that are resident together; states go through L2, with a flag per
// CTA.
//
// The loops of persistent_forward.h and persistent_backward.h are written against a group. It is bound to a
// batch tile and to a state n, which it receives; the CTA then computes its part of state n + 1. Binding
// computes all addresses, so that none is computed between the arrival of a state and the sending of the
// next:
//   bind(warp, batch_tile, n)   n = -1: there is no state to receive yet
//   advance(warp)               n += 1
//   receive(warp)               by all warps: waits for state n and multiplies W_hh by it
//   sum_offset(row, column)     where sum and sum4 read that element of the product
//   sum(warp, lane, q, offset)  the product for the lane's element q; offset: sum_offset's
//   sum4(warp, lane, q, offset) the same for four rows, the gates of a unit
//   address(warp, row, k)       of element k of the CTA's part of state n + 1
//   pointer(warp, address)      to that element
//   next(address)               the same element of state n + 2, called before advance()
//   previous(address)           the same element of state n
//   send(warp)                  by all warps, after a block_sync that follows the writes of state n + 1
//   leave(warp)                 at the end
// Elements maps the elements of a batch tile to threads.
#pragma once

#include "cuda/exchange.h"
#include "cuda/resident.h"

namespace fastlstm::cuda {

// A has ROWS rows; the part of a state that a CTA computes is CTA_ELEMENTS elements of K.
template <class T, int UNITS, int ROWS, int CTA_ELEMENTS, int REGISTER_ITERS, int N_TILES,
          bool FEW_REGISTERS = true>
class FlagGroup {
 public:
  static constexpr bool kCluster = false, kDataFlag = false;
  static constexpr int kUnits = UNITS, kBatchTileRows = 8 * N_TILES;
  using Elements = ElementMap<UNITS, 8 * N_TILES>;
  using StateAddress = T*;

  FASTLSTM_DEVICE FlagGroup(const Persistent& s, const Warp& warp, const CtaCoord& cta)
      : s_(s), cta_(cta), product_(warp, s.packed_weights, cta.global_rank(s.layout), s.layout.iters, 0) {}

  FASTLSTM_DEVICE void bind(const Warp& warp, int batch_tile, int n) {
    const Layout& p = s_.layout;
    const int64_t tile = int64_t{cta_.d} * p.batch_tiles + batch_tile;
    epoch_ = s_.epoch + 1 + static_cast<uint32_t>(n);
    state_ = s_.exchange + (2 * tile + epoch_ % 2) * p.state_words;
    to_other_slot_ = static_cast<int>(epoch_ % 2 == 0 ? p.state_words : -p.state_words);
    uint32_t* const flags = s_.flags + tile * p.ctas_per_group;
    cta_flag_ = flags + cta_.rank;
    // The CTAs whose parts overlap the warp's share of K.
    const int share = p.iters * kKSliceElements<T>, begin = warp.index() * share;
    const int first = begin / CTA_ELEMENTS, end = (begin + share + CTA_ELEMENTS - 1) / CTA_ELEMENTS;
    for (const int lane : warp.lanes()) {
      flag_[lane] =
          first + lane < (end < p.ctas_per_group ? end : p.ctas_per_group) ? flags + first + lane : nullptr;
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) from_[c][lane] = state_ + product_.first_word(warp, lane, c);
    }
  }

  FASTLSTM_DEVICE void advance(const Warp& warp) {
    ++epoch_;
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) from_[c][lane] += to_other_slot_;
    }
    state_ += to_other_slot_;
    to_other_slot_ = -to_other_slot_;
  }

  FASTLSTM_DEVICE StateAddress address(const Warp&, int row, int k) const {
    return reinterpret_cast<T*>(state_ + to_other_slot_) +
           state_offset<T>(product_.k_slices(), row, cta_.rank * CTA_ELEMENTS + k);
  }
  FASTLSTM_DEVICE static T* pointer(const Warp&, StateAddress address) { return address; }
  FASTLSTM_DEVICE StateAddress previous(StateAddress address) const {
    return address - int64_t{to_other_slot_} * (16 / static_cast<int>(sizeof(T)));
  }
  FASTLSTM_DEVICE StateAddress next(StateAddress address) const { return previous(address); }

  FASTLSTM_DEVICE void send(const Warp& warp) const { raise_flag(warp, cta_flag_, epoch_ + 1); }

  FASTLSTM_DEVICE void receive(const Warp& warp) {
    wait_for_flags(warp, flag_, epoch_, s_.fault);
    product_.multiply(warp, from_, LoadL2());
    warp.block_sync();
  }

  FASTLSTM_DEVICE int sum_offset(int row, int column) const { return product_.sum_offset(row, column); }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int offset) const {
    return product_.sum(warp, offset);
  }
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int, int, int offset) const {
    return product_.sum4(warp, offset);
  }

  FASTLSTM_DEVICE void leave(const Warp&) const {}

 protected:  // benchmarks/cuda/steps.cu derives variants without a stage
  const Persistent& s_;
  const CtaCoord cta_;
  StateGemm<T, ROWS / 16, REGISTER_ITERS, N_TILES, kWarps, FEW_REGISTERS> product_;
  uint32_t epoch_;                       // of state n
  uint4* state_;                         // the slot of state n
  int to_other_slot_;                    // in words
  PerLane<const uint4*> from_[N_TILES];  // the lane's first word of state n
  PerLane<const uint32_t*> flag_;        // the flag that the lane polls
  uint32_t* cta_flag_;
};

}  // namespace fastlstm::cuda
