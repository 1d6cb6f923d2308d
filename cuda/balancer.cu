// rebalance: count, solve and assign in one launch, or two for large batches.
#include "cuda/route/launch.cuh"

namespace lplb::cuda {

cudaError_t LaunchRebalance(const RouteArguments& arguments, cudaStream_t stream) {
  if (arguments.batch == 0) return cudaSuccess;
  return WithRouting(arguments.problem, [&](auto routing) {
    return LaunchRoute<decltype(routing), Quotas::kSolved>(arguments, stream);
  });
}

}  // namespace lplb::cuda
