// The layer's calls of the CUDA runtime, separate so that the tests can replace them on the host.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include <memory>

#include "cuda/plan.h"

namespace fastlstm::cuda {

// RAII guard: makes the tensor's device current. stream() is that device's current stream.
class DeviceGuard {
 public:
  explicit DeviceGuard(const at::Tensor& tensor);
  ~DeviceGuard();
  cudaStream_t stream() const;

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
};

// Of the current device; sms = 0 if it cannot run persistent kernels.
DeviceLimits device_limits();

// Throws c10's error if a launch failed.
void check(cudaError_t status);

}  // namespace fastlstm::cuda
