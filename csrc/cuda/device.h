// The few things the layer asks of the CUDA runtime; apart so that the tests can run it on the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "cuda/plan.h"

namespace fastlstm::cuda {

// Makes the device of a tensor current while it lives. stream() is that device's current stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const at::Tensor& tensor);
  ~OnDeviceOf();
  cudaStream_t stream() const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

// Of the current device; no SMs where the persistent kernels cannot run on it at all.
DeviceLimits device_limits();

// Throws what c10 throws unless a launch succeeded.
void check(cudaError_t status);

}  // namespace fastlstm::cuda
