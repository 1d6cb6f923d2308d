// rebalance on the GPU, with and without other ranks: one launch, two for large batches.
#include "xla_ffi/balancer.h"

#include "cuda/solver.h"
#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/limits.h"
#include "xla_ffi/cuda/route.h"

namespace lplb {
namespace {

cuda::RouteArguments ArgumentsOf(const RebalanceCall& call) {
  cuda::RouteArguments arguments = RouteArgumentsOf(call);
  arguments.solve_in = call.in;
  arguments.solve_out = call.out;
  arguments.costs = call.costs;
  arguments.copies = {call.copies.fan_out, call.copies.width, call.copies.out};
  return arguments;
}

ffi::Error RunRebalance(const RebalanceCall& call, const OnDevice& on) {
  const cuda::RouteArguments arguments = ArgumentsOf(call);
  LPLB_RETURN_IF_ERROR(CheckSolverFits(call.problem, cuda::SolveSharedBytes(call.problem)));
  LPLB_RETURN_IF_ERROR(CheckRouteFits(arguments, cuda::Quotas::kSolved));
  return FromCuda(cuda::LaunchRebalance(arguments, on.stream), "rebalance");
}

ffi::Error RunRebalanceCosts(const RebalanceCostsCall& call, const OnDevice& on) {
  return RunRebalance(call, on);
}

struct SyncedRebalanceCall {
  RebalanceCall rebalance;
  int64_t comm;
  const int32_t* rank;  // []

  explicit SyncedRebalanceCall(Frame& frame, bool has_costs = false) : rebalance(frame, has_costs) {
    comm = frame.Attribute("comm", 0, kInt64Max);
    frame.Operand("rank", {}, &rank);
    frame.NoBatch("indices");
  }
};

struct SyncedRebalanceCostsCall : SyncedRebalanceCall {
  explicit SyncedRebalanceCostsCall(Frame& frame)
      : SyncedRebalanceCall(frame, /*has_costs=*/true) {}
};

ffi::Error RunSyncedRebalance(const SyncedRebalanceCall& call, const OnDevice& on) {
  cuda::RouteArguments arguments = ArgumentsOf(call.rebalance);
  const Problem& p = arguments.problem;
  LPLB_RETURN_IF_ERROR(CheckSolverFits(p, cuda::SolveSharedBytes(p)));
  LPLB_RETURN_IF_ERROR(CheckRouteFits(arguments, cuda::Quotas::kSynced));
  const auto found = FindRank(call.comm, on.ordinal);
  if (found.has_error()) return found.error();
  const cuda::Peers& peers = found->peers;
  if (peers.size != p.ep_size || p.n_logical + 1 > peers.stride || found->put_kernel != nullptr) {
    return Invalid("comm: it is of " + std::to_string(peers.size) + " ranks and at most " +
                   std::to_string(peers.stride - 1) + " experts, got ep_size = " +
                   std::to_string(p.ep_size) + " and n_logical = " + std::to_string(p.n_logical));
  }
  if (p.n_logical < p.ep_size) {  // Nobody would await the invalid ids of the last ranks.
    return Invalid("n_logical: expected at least one expert per rank, got " +
                   std::to_string(p.n_logical) + " on " + std::to_string(p.ep_size) + " ranks");
  }
  arguments.given.rank = call.rank;
  arguments.peers = peers;
  return FromCuda(cuda::LaunchSyncedRebalance(arguments, on.stream), "rebalance");
}

ffi::Error RunSyncedRebalanceCosts(const SyncedRebalanceCostsCall& call, const OnDevice& on) {
  return RunSyncedRebalance(call, on);
}

const Register rebalance({"lplb_rebalance", CudaHandler<RebalanceCall, RunRebalance>});
const Register rebalance_costs({"lplb_rebalance_costs",
                                CudaHandler<RebalanceCostsCall, RunRebalanceCosts>});
const Register synced_rebalance({"lplb_synced_rebalance",
                                 CudaHandler<SyncedRebalanceCall, RunSyncedRebalance>,
                                 InitializeComm});
const Register synced_rebalance_costs(
    {"lplb_synced_rebalance_costs", CudaHandler<SyncedRebalanceCostsCall, RunSyncedRebalanceCosts>,
     InitializeComm});

}  // namespace
}  // namespace lplb
