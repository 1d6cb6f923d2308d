// The launches of rebalance that choose copies first, for those that do not: files of their own, as
// they take long to compile.
#ifndef LPLB_CUDA_ROUTE_OVER_COPIES_H_
#define LPLB_CUDA_ROUTE_OVER_COPIES_H_

#include "cuda/route.h"

namespace lplb::cuda {

cudaError_t LaunchRebalanceOverCopies(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t LaunchSyncedRebalanceOverCopies(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t PreloadSyncedRebalanceOverCopies();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_OVER_COPIES_H_
