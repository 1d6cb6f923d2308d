// ipm on the GPU.
#include "xla_ffi/ipm.h"

#include "cuda/ipm.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

ffi::Error RunIpm(const IpmCall& call, const OnDevice& on) {
  const Problem& p = call.problem;
  if (call.options.cusolverdx && !cuda::HasCuSolverDx()) {
    return Invalid("factor: this lplb_jax was built without cuSolverDx");
  }
  if (!cuda::IpmFitsOneBlock(p, call.options)) {
    return Invalid(
        "r2o: the CUDA interior point takes groups of at most 128 ranks whose edges and "
        "experts fit into 160 KiB of shared memory, got " +
        std::to_string(p.group_size) + " ranks with " + std::to_string(p.n_columns) +
        " columns and " + std::to_string(p.n_local) + " experts each");
  }
  return FromCuda(
      cuda::LaunchIpm(p, call.sources, call.options, call.batch, call.in, call.out, on.stream),
      "ipm");
}

const Register ipm({"lplb_ipm", CudaHandler<IpmCall, RunIpm>});

}  // namespace
}  // namespace lplb
