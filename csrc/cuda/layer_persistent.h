// The persistent kernels for a layer's two passes: whether they support a call, their buffers, and the
// launches over a range of steps.
#pragma once

#include "cuda/layer.h"
#include "cuda/persistent.h"

namespace fastlstm::cuda {

template <class T>
class PersistentPass {
 public:
  // Converts to false if the step-wise kernels must run, as they must with masks and layer normalization.
  // tf32: float32 GEMMs use TF32.
  PersistentPass(const Layer& l, Phase phase, bool tf32, cudaStream_t stream);

  explicit operator bool() const { return packed_weights_.defined(); }

  // Runs steps begin ... begin + count - 1 of both directions; slot_t is the t of slot 0. Returns false if
  // the stream's part of the device has too few SMs (a green context, MPS): nothing ran, this converts to
  // false from then on, and the step-wise kernels continue at step `begin`.
  bool forward(const ForwardStep<T>& step, int64_t begin, int64_t count, const int64_t (&slot_t)[2]);
  bool backward(const BackwardStep<T>& step, int64_t begin, int64_t count, const int64_t (&slot_t)[2],
                Acc<T>* dh);

 private:
  Persistent next(int64_t begin, int64_t count, const int64_t (&slot_t)[2]);
  bool launched(cudaError_t status);

  Layout layout_ = {};
  at::Tensor packed_weights_;
  at::Tensor exchange_;                          // Persistent's states, flags, and fault
  int64_t flags_offset_ = 0, fault_offset_ = 0;  // in 32-bit words
  cudaStream_t stream_;
  uint32_t epoch_ = 0;
};

}  // namespace fastlstm::cuda
