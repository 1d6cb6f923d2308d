// rebalance: count, solve and assign in one launch, or two for large batches.
#include "cuda/route/launch.cuh"
#include "cuda/route/over_copies.h"
#include "cuda/route/over_tiles.h"

namespace lplb::cuda {

cudaError_t LaunchRebalance(const RouteArguments& arguments, cudaStream_t stream) {
  if (arguments.batch == 0) return cudaSuccess;
  if (arguments.copies.fan_out > 0) return LaunchRebalanceOverCopies(arguments, stream);
  if (arguments.costs.base_load != nullptr) return LaunchRebalanceOverTiles(arguments, stream);
  return WithRouting(arguments.problem, [&](auto routing) {
    return LaunchRoute<decltype(routing), Quotas::kSolved>(arguments, stream);
  });
}

}  // namespace lplb::cuda
