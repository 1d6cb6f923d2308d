// Launchers of the interior point: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_IPM_H_
#define LPLB_CUDA_IPM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/interior.h"
#include "cuda/problem.h"

namespace lplb::cuda {

// Whether this was built with cuSolverDx.
bool HasCuSolverDx();

// Whether one block can hold a group of the problem.
bool IpmFitsOneBlock(const Problem& problem, const IpmOptions& options);

// Solves every group of every batch element, one block each. `problem` must fit, and cuSolverDx be
// there where it is asked for.
cudaError_t LaunchIpm(const Problem& problem, const Sources& sources, const IpmOptions& options,
                      int64_t batch, const IpmOperands& in, const SolveResults& out,
                      cudaStream_t stream);

// Launches a kernel that does nothing, for benchmarks.
cudaError_t LaunchEmpty(cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_H_
