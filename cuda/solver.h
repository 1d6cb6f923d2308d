// Launchers of the exact solver: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_SOLVER_H_
#define LPLB_CUDA_SOLVER_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"

namespace lplb::cuda {

constexpr int32_t kMaxGroupSize = 128;

// Shared memory of the block that solves one group.
int64_t SolveSharedBytes(const Problem& problem);

// Solves every group of every batch element, one block each. A group has at most kMaxGroupSize
// ranks. The current device must have room for SolveSharedBytes.
cudaError_t LaunchSolve(const Problem& problem, const Sources& sources, int64_t batch,
                        const SolveOperands& in, const SolveResults& out, cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_SOLVER_H_
