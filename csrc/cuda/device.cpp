#include "cuda/device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

namespace fastlstm::cuda {

struct OnDeviceOf::Guard {
  c10::cuda::CUDAGuard guard;
};

OnDeviceOf::OnDeviceOf(const at::Tensor& tensor) : guard_(new Guard{c10::cuda::CUDAGuard(tensor.device())}) {}
OnDeviceOf::~OnDeviceOf() = default;

cudaStream_t OnDeviceOf::stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

DeviceLimits device_limits() {
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(device); found != known.end()) return found->second;
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  };
  const bool able = ask(cudaDevAttrComputeCapabilityMajor) >= 8 && ask(cudaDevAttrCooperativeLaunch) != 0;
  // 16 is what Hopper and Blackwell allow; whether such a cluster fits is asked before it is launched.
  const DeviceLimits limits = {able ? ask(cudaDevAttrMultiProcessorCount) : 0,
                               ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                               ask(cudaDevAttrClusterLaunch) != 0 ? 16 : 0};
  known.emplace(device, limits);
  return limits;
}

void check(cudaError_t status) { C10_CUDA_CHECK(status); }

}  // namespace fastlstm::cuda
