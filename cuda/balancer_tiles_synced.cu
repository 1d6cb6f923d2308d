// rebalance with other ranks by the tiles that slots cost.
#include "cuda/route/launch.cuh"
#include "cuda/route/over_tiles.h"
#include "cuda/route/tiles.cuh"

namespace lplb::cuda {

cudaError_t LaunchSyncedRebalanceOverTiles(const RouteArguments& arguments, cudaStream_t stream) {
  return WithGraphWords(arguments.problem, [&](auto words) {
    return LaunchRoute<OverTiles<decltype(words)::value>, Quotas::kSynced>(arguments, stream);
  });
}

cudaError_t PreloadSyncedRebalanceOverTiles() {
  cudaError_t error = cudaSuccess;
  for (const int32_t ranks : {32, 64, 128, 512}) {
    if (error != cudaSuccess) return error;
    error = WithGraphWords(Problem(ranks, ranks, 0, ranks, ranks, 2), [](auto words) {
      return PreloadRoute<OverTiles<decltype(words)::value>, Quotas::kSynced>();
    });
  }
  return error;
}

}  // namespace lplb::cuda
