// rebalance with other ranks over copies chosen for the batch.
#include "cuda/route/batch_copies.cuh"
#include "cuda/route/launch.cuh"
#include "cuda/route/over_copies.h"

namespace lplb::cuda {

cudaError_t LaunchSyncedRebalanceOverCopies(const RouteArguments& arguments, cudaStream_t stream) {
  return WithGraphWords(arguments.problem, [&](auto words) {
    return LaunchRoute<OverBatchCopies<decltype(words)::value>, Quotas::kSynced>(arguments, stream);
  });
}

cudaError_t PreloadSyncedRebalanceOverCopies() {
  cudaError_t error = cudaSuccess;
  for (const int32_t ranks : {32, 64, 128, 512}) {
    if (error != cudaSuccess) return error;
    error = WithGraphWords(Problem(ranks, ranks, 0, ranks, ranks, 2), [](auto words) {
      return PreloadRoute<OverBatchCopies<decltype(words)::value>, Quotas::kSynced>();
    });
  }
  return error;
}

}  // namespace lplb::cuda
