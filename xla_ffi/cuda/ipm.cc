// ipm on the GPU.
#include "xla_ffi/ipm.h"

#include "cuda/ipm.h"
#include "xla_ffi/cuda/handlers.h"

namespace lplb {
namespace {

ffi::Error IpmImpl(int64_t ep_size, int64_t weighted, int64_t repair, int64_t cusolverdx,
                   ffi::AnyBuffer loads, IntBuffer phy2log, IntBuffer log2phy, IntBuffer r2o,
                   ffi::Buffer<ffi::DataType::F32> weights, AnyResult quota, AnyResult max_load,
                   AnyResult lower_bound, IntResult status, cudaStream_t stream) {
  const auto call = CheckIpm(ep_size, weighted, repair, cusolverdx, loads, phy2log, log2phy, r2o,
                             weights, quota, max_load, lower_bound, status);
  if (call.has_error()) return call.error();
  const Problem& p = call->problem;
  if (call->options.cusolverdx && !cuda::HasCuSolverDx()) {
    return Invalid("factor: this lplb_jax was built without cuSolverDx");
  }
  if (!cuda::IpmFitsOneBlock(p, call->options)) {
    return Invalid(
        "r2o: the CUDA interior point takes groups of at most 128 ranks whose edges and "
        "experts fit into 160 KiB of shared memory, got " +
        std::to_string(p.group_size) + " ranks with " + std::to_string(p.n_columns) +
        " columns and " + std::to_string(p.n_local) + " experts each");
  }
  return FromCuda(
      cuda::LaunchIpm(p, call->sources, call->options, call->batch, call->in, call->out, stream),
      "ipm");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(IpmCuda, IpmImpl, IpmBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
