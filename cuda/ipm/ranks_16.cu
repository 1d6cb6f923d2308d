#include "cuda/ipm/kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOf16(const Problem& p, const IpmOptions& options) {
  return WithEdges<16, 2>(p, options);
}

}  // namespace lplb::cuda
