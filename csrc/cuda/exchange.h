// How the blocks of a group tell each other that the state of a step is there: by a flag per block in global
// memory, or in a cluster by counting what arrives.
//
// A group is the blocks that hold one copy of W_hh. States are numbered in the order of steps, and state n is
// in slot n % 2 of two. Two slots are enough: a block writes state n + 1 after it has waited for all of state
// n, and no member completes its part of state n before its own reading of state n - 1, which n + 1
// overwrites, has gone into it.
#pragma once

#include "cuda/warp.cuh"

namespace fastlstm::cuda {

// Flags: each member writes its part of a state, then raises its flag to the state's epoch; a reader waits
// for the flags of the parts it reads. Epochs count up by one from state to state and are never reset while
// the buffers live.

// By one warp: after this, its lanes may read what members wrote for `epoch`, up to 32 of them. Each lane
// polls the flag of one; null: none.
FASTLSTM_DEVICE void await(const Warp& warp, const PerLane<const uint32_t*>& flag, uint32_t epoch,
                           uint32_t* fault) {
  for (const int lane : warp.lanes()) {
    if (flag[lane] == nullptr) continue;
#pragma unroll 1
    for (uint32_t tries = 0; load_acquire(flag[lane]) < epoch; ++tries) {
      if (tries == kMaxPolls) trap_on_timeout(fault, epoch);
    }
  }
  warp.sync();
}

// By all warps of a block, after a block_sync that follows what they wrote of the block's part.
FASTLSTM_DEVICE void publish(const Warp& warp, uint32_t* flag, uint32_t epoch) {
  if (warp.index() != 0) return;
  for (const int lane : warp.lanes()) {
    if (lane == 0) store_release(flag, epoch);
  }
}

// Arrivals: each member pushes its part of a state into the others' shared memory, where an mbarrier per slot
// counts the bytes. Each state is one phase of its slot's. A member's bytes may come before the receiver
// expects them, but never those of state n + 2 before the phase of state n has ended: they are pushed after
// the receiver's own part of state n + 1, and that is pushed after its wait for state n.
struct Mailbox {
  Arrivals slots[2];  // in shared memory

  // By all warps of a block, before anything is pushed to it: the cluster's blocks start together from here.
  FASTLSTM_DEVICE static void open(const Warp& warp, Mailbox* box) {
    for (const int lane : warp.lanes()) {
      if (warp.index() != 0 || lane != 0) continue;
      start(&box->slots[0]);
      start(&box->slots[1]);
    }
    warp.cluster_sync();
  }

  // By all warps: the bytes that the whole cluster will push to this block for a state, by its slot.
  FASTLSTM_DEVICE static void prepare(const Warp& warp, Arrivals* slot, int bytes) {
    for (const int lane : warp.lanes()) {
      if (warp.index() == 0 && lane == 0) expect(slot, static_cast<uint32_t>(bytes));
    }
    warp.sync();  // what follows may be a product of the whole warp
  }

  // By one warp: after this, its lanes may read what was pushed for state n.
  FASTLSTM_DEVICE static void await(const Warp& warp, const Mailbox* box, int n, uint32_t epoch,
                                    uint32_t* fault) {
    for (const int lane : warp.lanes()) {
      static_cast<void>(lane);
#pragma unroll 1
      for (uint32_t tries = 0;
           !ended(&box->slots[static_cast<unsigned>(n) % 2], static_cast<unsigned>(n) / 2 % 2); ++tries) {
        if (tries == kMaxPolls) trap_on_timeout(fault, epoch);
      }
    }
    acquire_pushed();
    warp.sync();
  }
};

}  // namespace fastlstm::cuda
