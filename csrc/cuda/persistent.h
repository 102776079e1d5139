// The persistent kernels: many steps of a layer in one launch, with W_hh in registers and shared memory for
// all of them. What they compute per element is step.h's, what they read and write is that of the step-wise
// kernels (cell_kernels.h), so either may continue where the other stopped:
// docs/gpu-kernels.md.
#pragma once

#include "cuda/cell_kernels.h"
#include "cuda/plan.h"

namespace fastlstm::cuda {

// W_hh in the order in which the lanes of a pass multiply it; padded with zeros, rounded to TF32 for float.
template <class T>
struct PackWeights {
  Layout layout;
  Phase phase;
  int64_t H;
  int D;
  const T* w_hh[2];           // [4H, H]  of any strides
  int64_t row[2], column[2];  // strides
  uint4* packed;              // [D, members, rounds, 8 warps, width, 2, 32 lanes]  out

  int64_t words() const {
    return int64_t{D} * layout.members * layout.rounds * kPlanWarps * layout.width * 64;
  }
};
template <class T>
cudaError_t launch_pack_weights(const PackWeights<T>& pack, cudaStream_t stream);

// A launch's share of the sequence and what its blocks exchange. The buffers are zeroed before the first
// launch that uses them; later ones go on counting epochs where the one before stopped.
struct Persistent {
  Layout layout;
  const uint4* packed;  // PackWeights' out
  uint4* exchange;      // [D, slices, 2, state]  states of two steps in turn; not of clusters, nor flags
  uint32_t* flags;      // [D, slices, members]   the epoch each member has published
  uint32_t* fault;      // [1]  the epoch a block waited for in vain, before its trap
  uint32_t epoch;       // the last one of the launches before
  int64_t begin;        // the first step in each direction's order (of backward: in the reverse of it)
  int count;            // steps
  int64_t slot_t[2];    // the t of slot 0, for buffers that hold some steps
};

// Reads step.state.h and step.c at the first step of a launch unless it is the sequence's first, and leaves
// them at the last; step.c_n and step.state.h_n are written at the sequence's last step. The fields first, t,
// slot and gates_h of `step` are not used.
template <class T>
struct PersistentForward : Persistent {
  ForwardStep<T> step;
};
template <class T>
int persistent_fwd_blocks(const Layout& p);  // that the current device can hold at once, in whole clusters
template <class T>
cudaError_t launch_persistent_fwd(const PersistentForward<T>& s, cudaStream_t stream);

// Reads step.gradient.dh at the first step of a launch unless it is the sequence's first.
template <class T>
struct PersistentBackward : Persistent {
  BackwardStep<T> step;
  Acc<T>* dh;  // [D, B, H]  out after the last step: dgates W_hh; null when nobody reads it
};
template <class T>
int persistent_bwd_blocks(const Layout& p);  // as persistent_fwd_blocks
template <class T>
cudaError_t launch_persistent_bwd(const PersistentBackward<T>& s, cudaStream_t stream);

}  // namespace fastlstm::cuda
