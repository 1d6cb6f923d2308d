// Launches the kernels that give every token its slot: they count the tokens, get or solve the
// quotas, and assign.
#ifndef LPLB_CUDA_ROUTE_LAUNCH_CUH_
#define LPLB_CUDA_ROUTE_LAUNCH_CUH_

#include "cuda/route/cluster_kernel.cuh"
#include "cuda/route/shape.h"
#include "cuda/route/tile_kernels.cuh"

namespace lplb::cuda {

// Launches the kernels for a.batch elements.
template <int kWords, int kColumns, Quotas kQuotas>
cudaError_t LaunchRoute(RouteArguments a, cudaStream_t stream) {
  const RouteShape shape = ChooseShape(a);
  const int32_t n_warps = shape.threads / 32;
  const int32_t bytes = RouteMemory::Bytes(a.problem, n_warps, shape.cluster, kQuotas);
  cudaError_t error;
  if (shape.cluster > 0) {
    const auto kernel = ClusterKernel<kWords, kColumns, kQuotas>;
    error = AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes, shape.cluster > 8);
    if (error != cudaSuccess) return error;
    a.rounds = shape.rounds;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(a.batch * shape.cluster));
    config.blockDim = dim3(kPlanThreads + shape.threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, a);
  }
  const auto kernel = TileRouteKernel<kWords, kColumns, kQuotas>;
  const auto count_kernel = TileCountKernel<kQuotas>;
  const int32_t count_bytes = 4 * n_warps * (a.problem.n_logical + 1);
  error = AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes, false);
  if (error != cudaSuccess) return error;
  error = AllowSharedMemory(reinterpret_cast<const void*>(count_kernel), count_bytes, false);
  if (error != cudaSuccess) return error;
  const int64_t warps = static_cast<int64_t>(a.n_tiles) * n_warps;
  a.tokens_per_warp = ((a.tokens.n_tokens + warps - 1) / warps + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(a.batch), a.n_tiles);
  count_kernel<<<grid, shape.threads, count_bytes, stream>>>(a);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  // Where the chip can, the second kernel starts beside the first and waits for it on the device.
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = HasClusters() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_LAUNCH_CUH_
