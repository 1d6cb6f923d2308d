#include "cuda/ipm/host_kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOfHosts16(const IpmOptions& options) { return OfHosts<16, 2>(options); }

}  // namespace lplb::cuda
