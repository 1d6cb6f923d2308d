// ipm on the GPU.
#include "xla_ffi/ipm.h"

#include "cuda/ipm.h"
#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/limits.h"

namespace lplb {
namespace {

ffi::Error RunIpm(const IpmCall& call, const OnDevice& on) {
  const Problem& p = call.problem;
  if (call.options.cusolverdx && !cuda::HasCuSolverDx()) {
    return Invalid("factor: this lplb_jax was built without cuSolverDx");
  }
  LPLB_RETURN_IF_ERROR(CheckElements(call));
  LPLB_RETURN_IF_ERROR(CheckIpmFits(p, call.options));
  return FromCuda(
      cuda::LaunchIpm(p, call.sources, call.options, call.batch, call.in, call.out, on.stream),
      "ipm");
}

const Register ipm({"lplb_ipm", CudaHandler<IpmCall, RunIpm>});

}  // namespace
}  // namespace lplb
