// solve on the GPU.
#include "xla_ffi/solver.h"

#include "xla_ffi/cuda/handlers.h"

namespace lplb {
namespace {

ffi::Error SolveImpl(int64_t ep_size, IntBuffer loads, IntBuffer phy2log, IntBuffer log2phy,
                     IntBuffer r2o, IntResult quota, IntResult max_load, IntResult lower_bound,
                     IntResult status, cudaStream_t stream) {
  const auto call =
      CheckSolve(ep_size, loads, phy2log, log2phy, r2o, quota, max_load, lower_bound, status);
  if (call.has_error()) return call.error();
  if (auto error = CheckSolves(call->problem); error.failure()) return error;
  return FromCuda(
      cuda::LaunchSolve(call->problem, call->sources, call->batch, call->in, call->out, stream),
      "solve");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SolveCuda, SolveImpl, SolveBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
