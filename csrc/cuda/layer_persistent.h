// The persistent kernels as the layer's two passes use them: whether they can serve a call, their buffers,
// and the launches over a range of steps.
#pragma once

#include "cuda/layer.h"
#include "cuda/persistent.h"

namespace fastlstm::cuda {

// x W_ih^T of this many times kChunkBytes of steps: each launch loads W_hh again.
constexpr int64_t kPersistentChunks = 4;

template <class T>
class PersistentPass {
 public:
  // False, as a condition, if the step-wise kernels must run. tf32: float32 is multiplied in TF32.
  PersistentPass(const Layer& l, Phase phase, bool tf32, cudaStream_t stream);

  explicit operator bool() const { return packed_.defined(); }

  // Runs the steps begin ... begin + count - 1 of both directions; slot_t is the t of slot 0. Returns false
  // if the stream's part of the device has no room for the blocks (a green context, MPS): nothing ran, this
  // converts to false from then on, and the step-wise kernels continue at step `begin`.
  bool forward(const ForwardStep<T>& step, int64_t begin, int64_t count, const int64_t (&slot_t)[2]);
  bool backward(const BackwardStep<T>& step, int64_t begin, int64_t count, const int64_t (&slot_t)[2],
                Acc<T>* dh);

 private:
  Persistent next(int64_t begin, int64_t count, const int64_t (&slot_t)[2]);
  bool launched(cudaError_t status);

  Layout layout_ = {};
  at::Tensor packed_;
  at::Tensor exchange_;  // of Persistent: the states, then the flags; the last flag is `fault`
  int64_t flags_at_ = 0, fault_at_ = 0;  // in 32-bit words
  cudaStream_t stream_;
  uint32_t epoch_ = 0;
};

}  // namespace fastlstm::cuda
