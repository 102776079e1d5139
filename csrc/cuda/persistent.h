// The persistent kernels: many steps of a layer in one launch, with W_hh in registers and shared memory. They
// read and write the same memory as the step-wise kernels (cell_kernels.h), so either kind may continue where
// the other stopped. See docs/gpu-kernels.md.
#pragma once

#include "cuda/cell_kernels.h"
#include "cuda/plan.h"

namespace fastlstm::cuda {

// Packs W_hh in the order of the lanes' operands; padded with zeros, rounded to TF32 for float.
template <class T>
struct PackWeights {
  Layout layout;
  Phase phase;
  int64_t H;
  int D;
  const T* w_hh[2];  // [4H, H]
  int64_t row_stride[2], column_stride[2];
  uint4* packed_weights;  // [D, CTAs, iters, 8 warps, m_tiles, 2, 32 lanes]  out

  int64_t words() const {
    return int64_t{D} * layout.ctas_per_group * layout.iters * kWarps * layout.m_tiles * 64;
  }
};
template <class T>
cudaError_t launch_pack_weights(const PackWeights<T>& pack, cudaStream_t stream);

// The steps of a launch, and the buffers through which its CTAs exchange states. The buffers and
// `fault` are zeroed, or with data flags filled with kEmptyWord, before the first launch that uses them;
// later launches continue the count of epochs.
struct Persistent {
  Layout layout;
  const uint4* packed_weights;  // PackWeights' output
  uint4* exchange;              // grid: [D, batch tiles, 2 or 4 slots, state_words]  states
  uint32_t* flags;              // grid: [D, batch tiles, CTAs]  the last epoch each CTA has published
  uint32_t* fault;              // [1]  the epoch that a CTA waited for until kMaxPolls
  uint32_t epoch;               // the last one of the previous launches
  int64_t begin;                // first step, in scan order (backward: in reverse scan order)
  int count;                    // steps
  int64_t slot_t[2];            // [D]  the t of slot 0, in buffers that hold some steps
};

// Reads step.state.h and step.c at the launch's first step, unless it is the first of the sequence, and
// writes them at its last step; step.c_n and step.state.h_n are written at the last step of the sequence. The
// fields first, t, slot and gates_h of `step` are not used.
template <class T>
struct PersistentForward : Persistent {
  ForwardStep<T> step;
};
template <class T>
int max_resident_fwd_ctas(const Layout& p);  // on the current device, in whole clusters
template <class T>
cudaError_t launch_persistent_fwd(const PersistentForward<T>& s, cudaStream_t stream);

// Reads step.gradient.dh at the launch's first step, unless it is the first of the sequence.
template <class T>
struct PersistentBackward : Persistent {
  BackwardStep<T> step;
  Acc<T>* dh;  // [D, B, H]  out after the last step: dgates W_hh; null if not needed
};
template <class T>
int max_resident_bwd_ctas(const Layout& p);  // as max_resident_fwd_ctas
template <class T>
cudaError_t launch_persistent_bwd(const PersistentBackward<T>& s, cudaStream_t stream);

}  // namespace fastlstm::cuda
