#include "cuda/ipm/host_kernel.cuh"

namespace lplb::cuda {

IpmChoice IpmOfHosts64(const IpmOptions& options) { return OfHosts<64, 4>(options); }

}  // namespace lplb::cuda
