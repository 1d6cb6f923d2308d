// How the kernels of assign and rebalance are launched.
#ifndef LPLB_CUDA_ROUTE_SHAPE_H_
#define LPLB_CUDA_ROUTE_SHAPE_H_

#include "cuda/route.h"

namespace lplb::cuda {

struct RouteShape {
  int32_t cluster;  // blocks of a cluster; 0: tiles
  int32_t threads;
  int32_t rounds;
};

RouteShape ChooseShape(const RouteArguments& arguments);

bool HasClusters();

cudaError_t AllowSharedMemory(const void* kernel, int32_t bytes, bool large_cluster);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_SHAPE_H_
