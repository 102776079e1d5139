// How the CTAs of a group signal that their parts of a step's state are there: by a flag per CTA in global
// memory, by the data themselves, or in a cluster by the bytes that complete on an mbarrier.
//
// A group is the CTAs that hold one copy of W_hh. States are numbered in the order of steps. With flags, and
// in a cluster, state n is in slot n % 2 of two. Two slots are enough: a CTA writes state n + 1 after it has
// waited for all of state n, and no CTA completes its part of state n before its own reads of state n - 1,
// which n + 1 overwrites, have gone into that part.
#pragma once

#include "cuda/warp.cuh"

namespace fastlstm::cuda {

// Flags: each CTA writes its part of a state, then raises its flag to the state's epoch; a reader waits for
// the flags of the parts it reads. Epochs count up by one per state and are not reset while the buffers live.

// Called by one warp: afterwards its lanes may read what up to 32 CTAs wrote for `epoch`. Each lane polls one
// flag; null: none.
FASTLSTM_DEVICE void wait_for_flags(const Warp& warp, const PerLane<const uint32_t*>& flag, uint32_t epoch,
                                    uint32_t* fault) {
  for (const int lane : warp.lanes()) {
    if (flag[lane] == nullptr) continue;
#pragma unroll 1
    for (uint32_t polls = 0; load_acquire(flag[lane]) < epoch; ++polls) {
      if (polls == kMaxPolls) trap_on_timeout(fault, epoch);
    }
  }
  warp.sync();
}

// Called by all warps of a CTA, after a block_sync that follows their writes of the CTA's part.
FASTLSTM_DEVICE void raise_flag(const Warp& warp, uint32_t* flag, uint32_t epoch) {
  if (warp.index() != 0) return;
  for (const int lane : warp.lanes()) {
    if (lane == 0) store_release(flag, epoch);
  }
}

// Data flags: a word of 32 bits is kEmptyWord until it is written, and readers poll the words themselves.
// State n is in slot n % 4 of four. After its words of state n a thread clears the same words in the slot of
// state n + 2, and a fence orders that before its words of state n + 1:
//   - The slot of state n + 2 held state n - 2, which no CTA reads any more: each sent its part of state
//     n - 1, for which this CTA has waited, after its own reads of state n - 2.
//   - A thread that polls a word of state n + 2 has taken the same word of state n + 1, written by the same
//     thread after the clearing and the fence, and has executed a fence itself since. So it sees the cleared
//     word or state n + 2, never state n - 2.
// The argument is about one writer and one reader of one word, so nothing else has to be ordered. It needs a
// fence per step of every thread that polls, also of those that write nothing. The fence is between the
// sending and the next poll, and waits until the thread's words and clears have reached L2: nothing waits for
// it before a state is sent, but it delays the next poll if the other CTAs' words arrive sooner.
// tests/gpu/test_exchange_model.py explores all interleavings; three slots, another distance, or a missing
// fence fail there.
//
// Epochs count on from launch to launch, and a launch ends after its last state was taken, so the next launch
// continues the same sequence of slots; the buffer is filled with kEmptyWord once. Padding is written once,
// as zeros, and never cleared. kEmptyWord is two NaNs of 16 bits, or one of 32. A state may contain NaN:
// conversions to 16 bits give another one, 0x7fff, but a float32 keeps the payload of its source. So a word
// equal to kEmptyWord is stored as kNanWord, which has the same meaning in each dtype.
constexpr uint32_t kNanWord = 0x7fff7fffu;

FASTLSTM_DEVICE uint32_t non_empty(uint32_t word) { return word == kEmptyWord ? kNanWord : word; }
FASTLSTM_DEVICE bool is_complete(const uint4& x) {
  return x.x != kEmptyWord && x.y != kEmptyWord && x.z != kEmptyWord && x.w != kEmptyWord;
}

// DSMEM: each CTA stores its part of a state into its peers' shared memory, where each slot has an mbarrier
// that counts the bytes. Each state is one phase of its slot's mbarrier. Bytes of a state may arrive before
// the receiver expects them, but bytes of state n + 2 never before the phase of state n has completed: they
// are sent after the receiver's own part of state n + 1, which is sent after its wait for state n.
struct DsmemExchange {
  Mbarrier slots[2];  // in shared memory

  // Called by all warps of a CTA, before the first remote store; a barrier of the cluster.
  FASTLSTM_DEVICE static void init(const Warp& warp, DsmemExchange* exchange) {
    for (const int lane : warp.lanes()) {
      if (warp.index() != 0 || lane != 0) continue;
      mbarrier_init(&exchange->slots[0]);
      mbarrier_init(&exchange->slots[1]);
    }
    warp.cluster_sync();
  }

  // Called by all warps. bytes: what the whole cluster sends to this CTA for the state of this slot.
  FASTLSTM_DEVICE static void expect_bytes(const Warp& warp, Mbarrier* slot, int bytes) {
    for (const int lane : warp.lanes()) {
      if (warp.index() == 0 && lane == 0) mbarrier_expect_tx(slot, static_cast<uint32_t>(bytes));
    }
    warp.sync();  // mma.sync of the whole warp may follow
  }

  // Called by one warp: afterwards its lanes may read what was sent for state n.
  FASTLSTM_DEVICE static void wait(const Warp& warp, const DsmemExchange* exchange, int n, uint32_t epoch,
                                   uint32_t* fault) {
    const auto state = static_cast<unsigned>(n);
    for (const int lane : warp.lanes()) {
      static_cast<void>(lane);
#pragma unroll 1
      for (uint32_t polls = 0; !mbarrier_test_wait(&exchange->slots[state % 2], state / 2 % 2); ++polls) {
        if (polls == kMaxPolls) trap_on_timeout(fault, epoch);
      }
    }
    acquire_dsmem();
    warp.sync();
  }
};

}  // namespace fastlstm::cuda
