// count and sync_loads on the GPU.
#include "xla_ffi/loads.h"

#include "cuda/loads.h"
#include "xla_ffi/cuda/comm.h"
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

ffi::Error SyncImpl(int64_t comm, IntBuffer counts, IntBuffer rank, IntResult matrix,
                    int32_t device, cudaStream_t stream) {
  const auto found = FindRank(comm, device);
  if (found.has_error()) return found.error();
  const cuda::Peers& peers = found->peers;
  const int64_t n = counts.element_count();
  if (n > peers.stride || rank.element_count() != 1 ||
      matrix->element_count() != static_cast<size_t>(n * peers.size)) {
    return Invalid("counts: expected at most " + std::to_string(peers.stride) +
                   " and a matrix [ep_size, n] for " + std::to_string(peers.size) + " ranks");
  }
  return FromCuda(LaunchSync(*found, rank.typed_data(), counts.typed_data(),
                             static_cast<int32_t>(n), matrix->typed_data(), stream),
                  "sync_loads");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CountCuda, CountImpl, CountBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SyncCuda, SyncImpl,
                              ffi::Ffi::Bind()
                                  .Attr<int64_t>("comm")
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // counts [n]
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // rank []
                                  .Ret<ffi::Buffer<ffi::DataType::S32>>()  // matrix [ep_size, n]
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
