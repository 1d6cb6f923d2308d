// assign: tokens to slots, from given quotas.
#include "cuda/route/launch.cuh"

namespace lplb::cuda {

cudaError_t LaunchAssign(const RouteArguments& arguments, cudaStream_t stream) {
  if (arguments.batch == 0) return cudaSuccess;
  return LaunchRoute<0, 0, Quotas::kGiven>(arguments, stream);
}

}  // namespace lplb::cuda
