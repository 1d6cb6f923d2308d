#include <map>
#include <mutex>

#include "cuda/device.h"

namespace lplb::cuda {
namespace {

constexpr int32_t kMostThreads = 1024;  // Per block, on every chip.

// Compiled like all other kernels. With a block's maximum of shared memory and threads, its cluster
// is as hard to place as any.
__global__ void __launch_bounds__(kMostThreads, 1) ProbeKernel() {}

// Only some chips allow clusters of more than 8 blocks, and part of a chip (MIG) may not even allow
// 8. The driver knows.
cudaError_t AskLargestCluster(int32_t shared_bytes, int32_t* largest) {
  cudaError_t error =
      cudaFuncSetAttribute(ProbeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(ProbeKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(16);
  config.blockDim = dim3(kMostThreads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaOccupancyMaxPotentialClusterSize(largest, ProbeKernel, &config);
}

cudaError_t AskDevice(int ordinal, Device* device) {
  int major = 0;
  int minor = 0;
  int clusters = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } questions[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                   {cudaDevAttrComputeCapabilityMinor, &minor},
                   {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes},
                   {cudaDevAttrClusterLaunch, &clusters}};
  for (const auto& [attribute, value] : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(value, attribute, ordinal);
    if (error != cudaSuccess) return error;
  }
  cudaFuncAttributes probe;
  const cudaError_t error = cudaFuncGetAttributes(&probe, ProbeKernel);
  if (error != cudaSuccess) return error;
  // Kernels compiled only for older chips have no code for clusters or dependent launch.
  const bool compiled = probe.ptxVersion >= 90;
  device->capability = 10 * major + minor;
  device->dependent_launch = compiled && major >= 9;
  device->largest_cluster = 0;
  if (!compiled || clusters == 0) return cudaSuccess;
  return AskLargestCluster(device->shared_bytes, &device->largest_cluster);
}

// Devices by ordinal.
std::mutex mutex;
std::map<int, Device> known;

}  // namespace

cudaError_t CurrentDevice(Device* device) {
  int ordinal = 0;
  cudaError_t error = cudaGetDevice(&ordinal);
  if (error != cudaSuccess) return error;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(ordinal);
    if (found != known.end()) {
      *device = found->second;
      return cudaSuccess;
    }
  }
  // Unlocked, so that other threads need not wait for the driver. Concurrent callers get the same
  // answer.
  error = AskDevice(ordinal, device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  known.emplace(ordinal, *device);
  return cudaSuccess;
}

void AssumeDevice(int ordinal, const Device* device) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (device == nullptr) {
    known.erase(ordinal);
  } else {
    known[ordinal] = *device;
  }
}

}  // namespace lplb::cuda
