// rebalance with other ranks: the launches of balancer.cu, with the exchange of counts in them.
#include "cuda/route/launch.cuh"

namespace lplb::cuda {
namespace {

template <typename Kernel>
cudaError_t Preload(Kernel kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

}  // namespace

cudaError_t LaunchSyncedRebalance(const RouteArguments& arguments, cudaStream_t stream) {
  return WithRouting(arguments.problem, [&](auto routing) {
    return LaunchRoute<decltype(routing), Quotas::kSynced>(arguments, stream);
  });
}

cudaError_t PreloadSyncedRebalance() {
  cudaError_t error = Preload(TileCountKernel<Quotas::kSynced>);
  const auto preload = [&](const Problem& problem) {
    if (error != cudaSuccess) return;
    error = WithRouting(problem, [](auto routing) {
      using Routing = decltype(routing);
      const cudaError_t failed = Preload(ClusterKernel<Routing, Quotas::kSynced>);
      return failed != cudaSuccess ? failed : Preload(TileRouteKernel<Routing, Quotas::kSynced>);
    });
  };
  // Every routing that WithRouting knows: up to five columns, and none.
  for (const int32_t ranks : {32, 64, 128, 512}) {
    for (int32_t columns = 0; columns <= 5; ++columns) {
      Problem problem(ranks, ranks, columns, ranks, ranks, 2);
      problem.node_size = columns == 0 ? ranks : 0;
      preload(problem);
    }
  }
  return error;
}

}  // namespace lplb::cuda
