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
  // Serves nothing unless persistent_enabled; `tf32`: whether float32 multiplies so.
  PersistentPass(const Layer& l, Phase phase, bool tf32, cudaStream_t stream);

  explicit operator bool() const { return packed_.defined(); }

  // The steps begin ... begin + count - 1 of both directions; slot_t is the t of slot 0.
  void forward(const ForwardStep<T>& step, int64_t begin, int64_t count, const int64_t (&slot_t)[2]);
  void backward(const BackwardStep<T>& step, int64_t begin, int64_t count, const int64_t (&slot_t)[2],
                Acc<T>* dh);

 private:
  Persistent next(int64_t begin, int64_t count, const int64_t (&slot_t)[2]);

  Layout layout_ = {};
  at::Tensor packed_;
  at::Tensor exchange_, flags_;  // of Persistent; the last flag is `fault`
  cudaStream_t stream_;
  uint32_t epoch_ = 0;
};

}  // namespace fastlstm::cuda
