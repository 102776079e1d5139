#include "cuda/device.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>

namespace fastlstm::cuda {

struct DeviceGuard::Guard {
  c10::cuda::CUDAGuard guard;
};

DeviceGuard::DeviceGuard(const at::Tensor& tensor)
    : guard_(new Guard{c10::cuda::CUDAGuard(tensor.device())}) {}
DeviceGuard::~DeviceGuard() = default;

cudaStream_t DeviceGuard::stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

DeviceLimits device_limits() {
  int device = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  static std::mutex mutex;
  static std::map<int, DeviceLimits> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto entry = cache.find(device); entry != cache.end()) return entry->second;
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
  };
  const bool supported =
      ask(cudaDevAttrComputeCapabilityMajor) >= 8 && ask(cudaDevAttrCooperativeLaunch) != 0;
  // Hopper and Blackwell allow 16; the runtime is asked whether such a cluster fits before it is launched.
  const DeviceLimits limits = {supported ? ask(cudaDevAttrMultiProcessorCount) : 0,
                               ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                               ask(cudaDevAttrClusterLaunch) != 0 ? 16 : 0};
  cache.emplace(device, limits);
  return limits;
}

void check(cudaError_t status) { C10_CUDA_CHECK(status); }

}  // namespace fastlstm::cuda
