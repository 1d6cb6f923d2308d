#include "cuda/ipm/host_kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOfHosts128(const IpmOptions& options) { return OfHosts<128, 4>(options); }

}  // namespace lplb::cuda
