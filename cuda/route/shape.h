// How the kernels of assign and rebalance are launched: arithmetic, without a GPU.
#ifndef LPLB_CUDA_ROUTE_SHAPE_H_
#define LPLB_CUDA_ROUTE_SHAPE_H_

#include "cuda/device.h"
#include "cuda/route.h"

namespace lplb::cuda {

struct RouteShape {
  int32_t cluster;       // blocks of a cluster; 0: tiles
  int32_t threads;       // of a block, that hold tokens; 0: no block has room for the problem
  int32_t rounds;        // tokens of such a thread, in a cluster
  int32_t shared_bytes;  // of a block
};

// The shape for n_tokens tokens of each batch element, whose copies are chosen first or not. The
// problem has at most kMaxExperts experts and kMaxSlots slots.
RouteShape ChooseShape(const Problem& problem, Quotas quotas, bool chooses, int64_t n_tokens,
                       const Device& device);

// Shared memory of the smallest block that any shape has.
int32_t LeastSharedBytes(const Problem& problem, Quotas quotas, bool chooses);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_SHAPE_H_
