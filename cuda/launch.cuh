// How all kernels are launched.
#ifndef LPLB_CUDA_LAUNCH_CUH_
#define LPLB_CUDA_LAUNCH_CUH_

#include <cstdint>
#include <type_traits>

namespace lplb::cuda {

struct LaunchShape {
  dim3 grid;
  int32_t threads;                // per block
  int64_t shared_bytes = 0;       // per block, dynamic
  int32_t cluster = 0;            // blocks per cluster; 0: no clusters
  bool dependent_launch = false;  // See Device: the kernel itself waits for its predecessor.
};

// Kernels get 48 KiB without asking. Some use up to 1 KiB of it statically.
constexpr int64_t kUnaskedSharedBytes = 47 << 10;
constexpr int32_t kPortableCluster = 8;

// The current device must support `shape`.
template <typename... Parameters>
cudaError_t Launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const std::common_type_t<Parameters>&... arguments) {
  if (shape.shared_bytes > kUnaskedSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  if (shape.cluster > kPortableCluster) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 0) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.dependent_launch) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_LAUNCH_CUH_
