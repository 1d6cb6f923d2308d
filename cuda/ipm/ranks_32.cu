#include "cuda/ipm/kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOf32(const Problem& p, const IpmOptions& options) {
  return WithEdges<32, 4>(p, options);
}

}  // namespace lplb::cuda
