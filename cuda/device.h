// What a chip allows a launch.
#ifndef LPLB_CUDA_DEVICE_H_
#define LPLB_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lplb::cuda {

// As the driver answers, or as a test makes it up. Sizes are chosen from it without a GPU.
struct Device {
  int32_t capability;       // compute capability: 10 · major + minor
  int32_t shared_bytes;     // shared memory of a block, at most
  int32_t largest_cluster;  // blocks of a cluster, at most; 0 where there are no clusters
  bool dependent_launch;    // A kernel can start before its predecessor ends, and wait for it.
};

// The current device. The driver is asked once per device: that loads a kernel, see PreloadSync.
cudaError_t CurrentDevice(Device* device);

// For tests: from now on CurrentDevice gives `device` for the current device. A null pointer asks
// the driver again.
cudaError_t AssumeDevice(const Device* device);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_DEVICE_H_
