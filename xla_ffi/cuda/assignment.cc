// assign on the GPU.
#include "xla_ffi/assignment.h"

#include "cuda/assignment.h"
#include "cuda/loads.h"
#include "xla_ffi/cuda/handlers.h"

namespace lplb {
namespace {

ffi::Error AssignImpl(int64_t ep_size, int64_t proportional, ffi::AnyBuffer indices,
                      IntBuffer counts, IntBuffer quota, IntBuffer log2phy, IntBuffer rank,
                      IntResult physical, IntResult workspace, cudaStream_t stream) {
  const auto call = CheckAssign(ep_size, indices, counts, quota, log2phy, rank);
  if (call.has_error()) return call.error();
  const Problem& p = call->problem;
  if (const auto error = CheckExperts(p.n_logical); error.failure()) return error;
  const int64_t n_tiles = FromEnd(workspace->dimensions(), 2);
  return WithIndexType(indices.element_type(), [&](auto* type) {
    using Index = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const cuda::Tokens<Index> tokens = {static_cast<const Index*>(indices.untyped_data()),
                                        physical->typed_data(),
                                        workspace->typed_data(),
                                        call->batch,
                                        call->n_tokens,
                                        n_tiles};
    return FromCuda(
        cuda::LaunchAssign(p, call->sources, call->in, proportional != 0, tokens, stream),
        "assign");
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AssignCuda, AssignImpl, AssignBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
