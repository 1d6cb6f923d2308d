// The limits of a chip on which launches depend.
#ifndef LPLB_CUDA_DEVICE_H_
#define LPLB_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lplb::cuda {

// As reported by the driver or made up by a test. Launch shapes are chosen from it without a GPU.
struct Device {
  int32_t capability;       // compute capability: 10 · major + minor
  int32_t shared_bytes;     // shared memory per block, at most
  int32_t largest_cluster;  // blocks per cluster, at most; 0 without clusters
  bool dependent_launch;    // A kernel can start before its predecessor ends, and wait for it.
};

// The current device. The driver is asked once per device. Asking loads a kernel, see PreloadSync.
cudaError_t CurrentDevice(Device* device);

// For tests: makes CurrentDevice return `device` for device `ordinal`. A null pointer makes it ask
// the driver again.
void AssumeDevice(int ordinal, const Device* device);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_DEVICE_H_
