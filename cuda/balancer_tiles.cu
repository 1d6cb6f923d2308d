// rebalance by the tiles that slots cost: the launches of balancer.cu.
#include "cuda/route/launch.cuh"
#include "cuda/route/over_tiles.h"
#include "cuda/route/tiles.cuh"

namespace lplb::cuda {

cudaError_t LaunchRebalanceOverTiles(const RouteArguments& arguments, cudaStream_t stream) {
  return WithGraphWords(arguments.problem, [&](auto words) {
    return LaunchRoute<OverTiles<decltype(words)::value>, Quotas::kSolved>(arguments, stream);
  });
}

}  // namespace lplb::cuda
