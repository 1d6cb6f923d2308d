// How the kernels of assign and rebalance are launched: arithmetic, without a GPU.
#ifndef LPLB_CUDA_ROUTE_SHAPE_H_
#define LPLB_CUDA_ROUTE_SHAPE_H_

#include "cuda/device.h"
#include "cuda/route.h"

namespace lplb::cuda {

struct RouteShape {
  int32_t cluster;       // blocks per cluster; 0: tiles
  int32_t threads;       // per block, that hold tokens; 0: no block has room for the problem
  int32_t rounds;        // tokens per such thread, in a cluster
  int32_t shared_bytes;  // per block
};

// The shape for n_tokens tokens per batch element. `chooses`: the element's copies are chosen
// first. The problem has at most kMaxExperts experts and kMaxSlots slots.
RouteShape ChooseShape(const Problem& problem, Quotas quotas, bool chooses, int64_t n_tokens,
                       const Device& device);

// Shared memory of the smallest block in any shape.
int32_t LeastSharedBytes(const Problem& problem, Quotas quotas, bool chooses);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_SHAPE_H_
