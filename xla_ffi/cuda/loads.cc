// count and sync_loads on the GPU.
#include "xla_ffi/loads.h"

#include "cuda/loads.h"
#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handler.h"

namespace lplb {
namespace {

ffi::Error RunCount(const CountCall& call, const OnDevice& on) {
  if (call.n_logical > cuda::kMaxCounted) {
    return Invalid("n_logical: the CUDA kernel counts at most " +
                   std::to_string(cuda::kMaxCounted) + " experts, got " +
                   std::to_string(call.n_logical));
  }
  return WithIndexType(call.tokens.type, [&](auto* type) {
    auto* indices = static_cast<decltype(type)>(call.tokens.indices);
    return FromCuda(cuda::LaunchCount(indices, call.batch, call.tokens.n, call.n_logical,
                                      call.counts, on.stream),
                    "count");
  });
}

struct SyncCall {
  int64_t comm;
  Size n = {"n"};
  Size n_ranks = {"ep_size"};
  const int32_t* counts;  // [n]
  const int32_t* rank;    // []
  int32_t* matrix;        // [ep_size, n]

  explicit SyncCall(Frame& frame) {
    comm = frame.Attribute("comm", 0, kInt64Max);
    frame.Operand("counts", {&n}, &counts);
    frame.Operand("rank", {}, &rank);
    frame.Result("matrix", {&n_ranks, &n}, &matrix);
    frame.NoBatch("counts");
  }
};

ffi::Error RunSync(const SyncCall& call, const OnDevice& on) {
  const auto found = FindRank(call.comm, on.ordinal);
  if (found.has_error()) return found.error();
  const cuda::Peers& peers = found->peers;
  if (call.n.value > peers.stride || call.n_ranks.value != peers.size) {
    return Invalid("counts: expected at most " + std::to_string(peers.stride) +
                   " and a matrix of " + std::to_string(peers.size) + " ranks, got " +
                   std::to_string(call.n.value) + " and " + std::to_string(call.n_ranks.value));
  }
  return FromCuda(
      LaunchSync(*found, call.rank, call.counts, call.n.narrow(), call.matrix, on.stream),
      "sync_loads");
}

const Register count({"lplb_count", CudaHandler<CountCall, RunCount>});
const Register sync({"lplb_sync", CudaHandler<SyncCall, RunSync>, InitializeComm});

}  // namespace
}  // namespace lplb
