// count on the GPU.
#include "xla_ffi/loads.h"

#include "cuda/loads.h"
#include "xla_ffi/cuda/handlers.h"

namespace lplb {
namespace {

ffi::Error CountImpl(int64_t n_logical, ffi::AnyBuffer indices, IntResult counts,
                     cudaStream_t stream) {
  const auto call = CheckCount(n_logical, indices, counts);
  if (call.has_error()) return call.error();
  if (n_logical > cuda::kMaxCounted) {
    return Invalid("n_logical: the CUDA kernel counts at most " +
                   std::to_string(cuda::kMaxCounted) + " experts, got " +
                   std::to_string(n_logical));
  }
  return WithIndexType(indices.element_type(), [&](auto* type) {
    auto* tokens = static_cast<decltype(type)>(indices.untyped_data());
    return FromCuda(cuda::LaunchCount(tokens, call->batch, call->n_tokens, call->n_logical,
                                      counts->typed_data(), stream),
                    "count");
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CountCuda, CountImpl, CountBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
