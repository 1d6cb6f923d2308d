#include "cuda/ipm/kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOf8(const Problem& p, const IpmOptions& options) {
  return WithEdges<8, 1>(p, options);
}

}  // namespace lplb::cuda
