// Launches of rebalance that choose copies first, called by those that do not. They take long to
// compile, so they are in files of their own.
#ifndef LPLB_CUDA_ROUTE_OVER_COPIES_H_
#define LPLB_CUDA_ROUTE_OVER_COPIES_H_

#include "cuda/route.h"

namespace lplb::cuda {

cudaError_t LaunchRebalanceOverCopies(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t LaunchSyncedRebalanceOverCopies(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t PreloadSyncedRebalanceOverCopies();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_OVER_COPIES_H_
