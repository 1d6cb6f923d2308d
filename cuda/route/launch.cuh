// Launches the kernels that assign every token a slot. They count the tokens, solve for the quotas
// or take the given ones, and assign.
#ifndef LPLB_CUDA_ROUTE_LAUNCH_CUH_
#define LPLB_CUDA_ROUTE_LAUNCH_CUH_

#include "cuda/launch.cuh"
#include "cuda/route/cluster_kernel.cuh"
#include "cuda/route/shape.h"
#include "cuda/route/tile_kernels.cuh"

namespace lplb::cuda {

// One launch per batch, with a cluster of blocks for every element.
template <typename Routing, Quotas kQuotas>
cudaError_t LaunchCluster(RouteArguments a, const RouteShape& shape, cudaStream_t stream) {
  a.rounds = shape.rounds;
  a.cluster = shape.cluster;
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(a.batch * shape.cluster));
  launch.threads = Routing::kPlanThreads + shape.threads;
  launch.shared_bytes = shape.shared_bytes;
  launch.cluster = shape.cluster;
  return Launch(ClusterKernel<Routing, kQuotas>, launch, stream, a);
}

// Two launches. If the chip supports it, the second starts beside the first and waits on the
// device.
template <typename Routing, Quotas kQuotas>
cudaError_t LaunchTiles(RouteArguments a, const RouteShape& shape, const Device& device,
                        cudaStream_t stream) {
  const int32_t n_warps = shape.threads / 32;
  const int64_t warps = static_cast<int64_t>(a.n_tiles) * n_warps;
  a.tokens_per_warp = ((a.tokens.n_tokens + warps - 1) / warps + 31) / 32 * 32;
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(a.batch), a.n_tiles);
  launch.threads = shape.threads;
  launch.shared_bytes = 4 * n_warps * (a.problem.n_logical + 1);
  const cudaError_t error = Launch(TileCountKernel<kQuotas>, launch, stream, a);
  if (error != cudaSuccess) return error;
  launch.shared_bytes = shape.shared_bytes;
  launch.dependent_launch = device.dependent_launch;
  return Launch(TileRouteKernel<Routing, kQuotas>, launch, stream, a);
}

// Launches the kernels for a.batch elements.
template <typename Routing, Quotas kQuotas>
cudaError_t LaunchRoute(const RouteArguments& a, cudaStream_t stream) {
  Device device;
  const cudaError_t error = CurrentDevice(&device);
  if (error != cudaSuccess) return error;
  const RouteShape shape =
      ChooseShape(a.problem, kQuotas, Routing::kChooses, a.tokens.n_tokens, device);
  if (shape.threads == 0) return cudaErrorInvalidConfiguration;
  return shape.cluster > 0 ? LaunchCluster<Routing, kQuotas>(a, shape, stream)
                           : LaunchTiles<Routing, kQuotas>(a, shape, device, stream);
}

// Loads the kernels of LaunchRoute, see PreloadSync.
template <typename Routing, Quotas kQuotas>
cudaError_t PreloadRoute() {
  const auto preload = [](auto* kernel) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  };
  cudaError_t error = preload(ClusterKernel<Routing, kQuotas>);
  if (error == cudaSuccess) error = preload(TileCountKernel<kQuotas>);
  if (error == cudaSuccess) error = preload(TileRouteKernel<Routing, kQuotas>);
  return error;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_LAUNCH_CUH_
