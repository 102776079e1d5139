// How the blocks of a group hand each other the state of a step, by a flag per block.
//
// A group is the blocks that hold one copy of W_hh. Each of its members writes its part of a step's state
// into one of two slots, then raises its flag to the state's epoch; a reader waits for the flags of the parts
// it reads. Epochs count up by one from step to step and are never reset while the buffers live, and the
// state of epoch e is in slot e % 2.
//
// Two slots are enough. A block overwrites the slot of epoch e - 1 with epoch e + 1 after all its warps
// together have waited for every member's flag e; a member raises that flag after a barrier behind which its
// own reading of epoch e - 1 lies.
#pragma once

#include "cuda/warp.cuh"

namespace fastlstm::cuda {

// By one warp: after this, its lanes may read what the members first ... last - 1 wrote for `epoch`.
FASTLSTM_DEVICE void await(const Warp& warp, const uint32_t* flags, int first, int last, uint32_t epoch,
                           uint32_t* fault) {
  for (const int lane : warp.lanes()) {
#pragma unroll 1
    for (int member = first + lane; member < last; member += 32) {
#pragma unroll 1
      for (uint32_t tries = 0; load_acquire(flags + member) < epoch; ++tries) {
        if (tries == kMostTries) give_up(fault, epoch);
      }
    }
  }
  warp.sync();
}

// By all warps of a block, each having written its share of the block's part.
FASTLSTM_DEVICE void publish(const Warp& warp, uint32_t* flags, int member, uint32_t epoch) {
  warp.block_sync();
  if (warp.index() != 0) return;
  for (const int lane : warp.lanes()) {
    if (lane == 0) store_release(flags + member, epoch);
  }
}

}  // namespace fastlstm::cuda
