// Launchers of the interior point: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_IPM_H_
#define LPLB_CUDA_IPM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/ipm/arithmetic.h"
#include "cuda/problem.h"

namespace lplb::cuda {

// Whether this was built with cuSolverDx.
bool HasCuSolverDx();

// Shared memory of the block that solves a group of at most kMaxGroupSize ranks, or all ranks of
// any placement. 0 if no kernel handles its shape.
int64_t IpmSharedBytes(const Problem& problem, const IpmOptions& options);

// Solves every group of every batch element, one block each. The current device must have room for
// IpmSharedBytes. If `options` asks for cuSolverDx, the build must include it.
cudaError_t LaunchIpm(const Problem& problem, const Sources& sources, const IpmOptions& options,
                      int64_t batch, const IpmOperands& in, const SolveResults& out,
                      cudaStream_t stream);

// Launches a kernel that does nothing, for benchmarks.
cudaError_t LaunchEmpty(cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_H_
