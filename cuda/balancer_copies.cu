// rebalance over copies chosen for the batch: the launches of balancer.cu.
#include "cuda/route/batch_copies.cuh"
#include "cuda/route/launch.cuh"
#include "cuda/route/over_copies.h"

namespace lplb::cuda {

cudaError_t LaunchRebalanceOverCopies(const RouteArguments& arguments, cudaStream_t stream) {
  return WithGraphWords(arguments.problem, [&](auto words) {
    return LaunchRoute<OverBatchCopies<decltype(words)::value>, Quotas::kSolved>(arguments, stream);
  });
}

}  // namespace lplb::cuda
