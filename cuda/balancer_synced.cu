// rebalance with other ranks: the launches of balancer.cu, with the exchange of counts in them.
#include "cuda/route/launch.cuh"
#include "cuda/route/over_copies.h"
#include "cuda/route/over_tiles.h"

namespace lplb::cuda {

cudaError_t LaunchSyncedRebalance(const RouteArguments& arguments, cudaStream_t stream) {
  if (arguments.copies.fan_out > 0) return LaunchSyncedRebalanceOverCopies(arguments, stream);
  if (arguments.costs.base_load != nullptr)
    return LaunchSyncedRebalanceOverTiles(arguments, stream);
  return WithRouting(arguments.problem, [&](auto routing) {
    return LaunchRoute<decltype(routing), Quotas::kSynced>(arguments, stream);
  });
}

cudaError_t PreloadSyncedRebalance() {
  cudaError_t error = PreloadSyncedRebalanceOverCopies();
  if (error == cudaSuccess) error = PreloadSyncedRebalanceOverTiles();
  const auto preload = [&](const Problem& problem) {
    if (error != cudaSuccess) return;
    error = WithRouting(
        problem, [](auto routing) { return PreloadRoute<decltype(routing), Quotas::kSynced>(); });
  };
  // Every routing that WithRouting can choose: up to five columns, or none.
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
