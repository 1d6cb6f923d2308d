// Launches the exact solver of any placement: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_GRAPH_SOLVER_H_
#define LPLB_CUDA_GRAPH_SOLVER_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"

namespace lplb::cuda {

// Ranks that one block can hold.
constexpr int32_t kMaxRanksAnywhere = 512;

// Shared memory of the block that solves one batch element.
int64_t GraphSolverBytes(const Problem& problem);

// What the waves start from.
enum class StartFrom {
  kEqualShares,
  kQuotas,  // a feasible split that is in out.quota before
};

// Solves every batch element, a block each; in.r2o is not read.
cudaError_t LaunchSolveGraph(const Problem& problem, const Sources& sources, int64_t batch,
                             const SolveOperands& in, const SolveResults& out, StartFrom start,
                             cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_SOLVER_H_
