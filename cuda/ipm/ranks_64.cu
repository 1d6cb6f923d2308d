#include "cuda/ipm/kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOf64(const Problem& p, const IpmOptions& options) {
  return WithEdges<64, 4>(p, options);
}

}  // namespace lplb::cuda
