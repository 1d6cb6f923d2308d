// rebalance on the GPU, where no other rank is involved: one launch, two for large batches.
#include "xla_ffi/balancer.h"

#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/route.h"

namespace lplb {
namespace {

ffi::Error RebalanceImpl(int64_t ep_size, int64_t positions, ffi::AnyBuffer indices,
                         IntBuffer phy2log, IntBuffer log2phy, IntBuffer r2o, IntResult physical,
                         IntResult position, IntResult slot_counts, IntResult quota,
                         IntResult max_load, IntResult lower_bound, IntResult status,
                         IntResult workspace, cudaStream_t stream) {
  const auto call = CheckRebalance(ep_size, positions, indices, phy2log, log2phy, r2o, position,
                                   slot_counts, quota, max_load, lower_bound, status);
  if (call.has_error()) return call.error();
  if (auto error = CheckSolves(call->problem); error.failure()) return error;
  auto arguments = RouteArgumentsOf(*call, indices, physical, position, slot_counts, workspace);
  if (arguments.has_error()) return arguments.error();
  arguments->sources = {1, call->problem.n_logical + 1};
  arguments->solve_in = call->in;
  arguments->solve_out = call->out;
  if (auto error = CheckRoute(*arguments, /*solves=*/true); error.failure()) return error;
  return FromCuda(cuda::LaunchRebalance(*arguments, stream), "rebalance");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RebalanceCuda, RebalanceImpl, RebalanceBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
