#include "cuda/ipm/kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOf128(const Problem& p, const IpmOptions& options) {
  return WithEdges<128, 4>(p, options);
}

}  // namespace lplb::cuda
