// Launchers of the exact solver where slots cost tiles and ranks have a base load. Pointers, sizes
// and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_TILES_H_
#define LPLB_CUDA_TILES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"

namespace lplb::cuda {

// Shared memory per block.
int64_t SolveCostsSharedBytes(const Problem& problem);

// Like LaunchSolve.
cudaError_t LaunchSolveCosts(const Problem& problem, const Sources& sources, int64_t batch,
                             const SolveOperands& in, const Costs& costs, const SolveResults& out,
                             cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_TILES_H_
