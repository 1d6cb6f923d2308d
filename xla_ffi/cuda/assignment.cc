// assign on the GPU.
#include "xla_ffi/assignment.h"

#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/route.h"

namespace lplb {
namespace {

ffi::Error AssignImpl(int64_t ep_size, int64_t proportional, int64_t positions,
                      ffi::AnyBuffer indices, IntBuffer counts, IntBuffer quota, IntBuffer log2phy,
                      IntBuffer rank, IntResult physical, IntResult position, IntResult slot_counts,
                      IntResult workspace, cudaStream_t stream) {
  const auto call =
      CheckAssign(ep_size, positions, indices, counts, quota, log2phy, rank, position, slot_counts);
  if (call.has_error()) return call.error();
  auto arguments = RouteArgumentsOf(*call, indices, physical, position, slot_counts, workspace);
  if (arguments.has_error()) return arguments.error();
  arguments->sources = call->sources;
  arguments->given = call->in;
  arguments->proportional = proportional != 0;
  if (auto error = CheckRoute(*arguments, cuda::Quotas::kGiven); error.failure()) return error;
  return FromCuda(cuda::LaunchAssign(*arguments, stream), "assign");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AssignCuda, AssignImpl, AssignBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
