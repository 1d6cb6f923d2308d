// Launches of rebalance by tiles, called by those by tokens. They take long to compile, so they are
// in files of their own.
#ifndef LPLB_CUDA_ROUTE_OVER_TILES_H_
#define LPLB_CUDA_ROUTE_OVER_TILES_H_

#include "cuda/route.h"

namespace lplb::cuda {

cudaError_t LaunchRebalanceOverTiles(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t LaunchSyncedRebalanceOverTiles(const RouteArguments& arguments, cudaStream_t stream);
cudaError_t PreloadSyncedRebalanceOverTiles();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_OVER_TILES_H_
