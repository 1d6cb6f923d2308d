#include "cuda/ipm/host_kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOfHosts32(const IpmOptions& options) { return OfHosts<32, 4>(options); }

}  // namespace lplb::cuda
