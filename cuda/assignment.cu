// assign: tokens to slots, from given quotas.
#include "cuda/route/launch.cuh"

namespace lplb::cuda {

cudaError_t LaunchAssign(const RouteArguments& arguments, cudaStream_t stream) {
  if (arguments.batch == 0) return cudaSuccess;
  if (arguments.problem.node_size > 0) {
    return WithGraphWords(arguments.problem, [&](auto words) {
      return LaunchRoute<Anywhere<decltype(words)::value>, Quotas::kGiven>(arguments, stream);
    });
  }
  return LaunchRoute<AlongTopology<0, 0>, Quotas::kGiven>(arguments, stream);
}

}  // namespace lplb::cuda
