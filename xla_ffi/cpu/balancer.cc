// rebalance where no other rank is involved: count, choose copies if asked to, solve and assign.
#include "xla_ffi/balancer.h"

#include <vector>

#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {
namespace {

ffi::Error RunRebalance(const RebalanceCall& call) {
  Problem p = call.problem;
  LPLB_RETURN_IF_ERROR(CheckTopology(p, call.batch, call.in.r2o));
  const int32_t rank = 0;
  if (call.copies.fan_out > 0) p.max_replicas = call.copies.width;
  return WithIndexType(call.tokens.type, [&](auto* type) {
    auto* indices = static_cast<decltype(type)>(call.tokens.indices);
    for (int64_t b = 0; b < call.batch; ++b) {
      auto* first = indices + b * call.tokens.n;
      std::vector<int32_t> counts(call.sources.row);
      Count(first, call.tokens.n, p.n_logical, counts.data());
      SolveOperands in = BatchElement(call.problem, call.sources, call.in, b);
      in.loads = counts.data();
      std::vector<int32_t> start;
      if (call.copies.fan_out > 0) {
        const CopiesResults copies = call.copies.Of(p, b);
        start = PlaceCopies(call.problem, call.sources, in, call.copies.fan_out, call.copies.width,
                            copies);
        in.phy2log = copies.phy2log;
        in.log2phy = copies.log2phy;
      }
      const SolveResults split = BatchElement(p, call.out, b);
      const Costs costs =
          call.costs.base_load != nullptr ? BatchElement(p, call.costs, b) : Costs();
      Solve(p, call.sources, in, split, costs, start.empty() ? nullptr : start.data());
      Assign(p, call.sources, {counts.data(), split.quota, in.phy2log, in.log2phy, &rank},
             /*proportional=*/false, first, call.tokens.n, ResultsOf(call.tokens, p, b));
    }
    return ffi::Error::Success();
  });
}

ffi::Error RunRebalanceCosts(const RebalanceCostsCall& call) { return RunRebalance(call); }

const Register rebalance({"lplb_rebalance", CpuHandler<RebalanceCall, RunRebalance>});
const Register rebalance_costs({"lplb_rebalance_costs",
                                CpuHandler<RebalanceCostsCall, RunRebalanceCosts>});

}  // namespace
}  // namespace lplb
