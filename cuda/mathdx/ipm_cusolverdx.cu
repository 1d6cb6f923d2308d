#include "cuda/ipm/kernel.cuh"
#include "cuda/mathdx/cholesky.cuh"

namespace lplb::cuda {

// Thread counts as in cmake/mathdx.py: the fastest of those tried.
IpmChoice IpmWithCuSolverDx(const Problem& p, const IpmOptions& options) {
  if (p.group_size <= 8) return WithEdges<8, 1, Cholesky>(p, options);
  if (p.group_size <= 16) return WithEdges<16, 4, Cholesky>(p, options);
  if (p.group_size <= 32) return WithEdges<32, 4, Cholesky>(p, options);
  if (p.group_size <= 64) return WithEdges<64, 2, Cholesky>(p, options);
  return WithEdges<128, 2, Cholesky>(p, options);
}

}  // namespace lplb::cuda
