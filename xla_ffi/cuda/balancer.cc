// rebalance on the GPU, with and without other ranks: one launch, two for large batches.
#include "xla_ffi/balancer.h"

#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/route.h"

namespace lplb {
namespace {

// The checked arguments but for the peers.
ffi::ErrorOr<cuda::RouteArguments> CheckedArguments(
    int64_t ep_size, int64_t positions, ffi::AnyBuffer indices, IntBuffer phy2log,
    IntBuffer log2phy, IntBuffer r2o, IntResult physical, IntResult position, IntResult slot_counts,
    IntResult quota, IntResult max_load, IntResult lower_bound, IntResult status,
    IntResult workspace, cuda::Quotas quotas) {
  const auto call = CheckRebalance(ep_size, positions, indices, phy2log, log2phy, r2o, position,
                                   slot_counts, quota, max_load, lower_bound, status);
  if (call.has_error()) return ffi::Unexpected(call.error());
  if (auto error = CheckSolves(call->problem); error.failure()) return ffi::Unexpected(error);
  auto arguments = RouteArgumentsOf(*call, indices, physical, position, slot_counts, workspace);
  if (arguments.has_error()) return arguments;
  arguments->sources = {1, call->problem.n_logical + 1};
  arguments->solve_in = call->in;
  arguments->solve_out = call->out;
  if (auto error = CheckRoute(*arguments, quotas); error.failure()) return ffi::Unexpected(error);
  return arguments;
}

ffi::Error RebalanceImpl(int64_t ep_size, int64_t positions, ffi::AnyBuffer indices,
                         IntBuffer phy2log, IntBuffer log2phy, IntBuffer r2o, IntResult physical,
                         IntResult position, IntResult slot_counts, IntResult quota,
                         IntResult max_load, IntResult lower_bound, IntResult status,
                         IntResult workspace, cudaStream_t stream) {
  const auto arguments = CheckedArguments(ep_size, positions, indices, phy2log, log2phy, r2o,
                                          physical, position, slot_counts, quota, max_load,
                                          lower_bound, status, workspace, cuda::Quotas::kSolved);
  if (arguments.has_error()) return arguments.error();
  return FromCuda(cuda::LaunchRebalance(*arguments, stream), "rebalance");
}

ffi::Error SyncedRebalanceImpl(int64_t ep_size, int64_t positions, ffi::AnyBuffer indices,
                               IntBuffer phy2log, IntBuffer log2phy, IntBuffer r2o,
                               IntResult physical, IntResult position, IntResult slot_counts,
                               IntResult quota, IntResult max_load, IntResult lower_bound,
                               IntResult status, IntResult workspace, int64_t comm, IntBuffer rank,
                               int32_t device, cudaStream_t stream) {
  auto arguments = CheckedArguments(ep_size, positions, indices, phy2log, log2phy, r2o, physical,
                                    position, slot_counts, quota, max_load, lower_bound, status,
                                    workspace, cuda::Quotas::kSynced);
  if (arguments.has_error()) return arguments.error();
  const auto found = FindRank(comm, device);
  if (found.has_error()) return found.error();
  const cuda::Peers& peers = found->peers;
  if (arguments->batch != 1 || rank.element_count() != 1 || peers.size != ep_size ||
      arguments->problem.n_logical + 1 > peers.stride || found->put_kernel != nullptr) {
    return Invalid("comm: it is of " + std::to_string(peers.size) + " ranks and at most " +
                   std::to_string(peers.stride - 1) +
                   " experts, got ep_size = " + std::to_string(ep_size) +
                   " and n_logical = " + std::to_string(arguments->problem.n_logical));
  }
  arguments->given.rank = rank.typed_data();
  arguments->peers = peers;
  return FromCuda(cuda::LaunchSyncedRebalance(*arguments, stream), "rebalance");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RebalanceCuda, RebalanceImpl, RebalanceBinding().Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SyncedRebalanceCuda, SyncedRebalanceImpl,
                              RebalanceBinding()
                                  .Attr<int64_t>("comm")
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // rank []
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace lplb
