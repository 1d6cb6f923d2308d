// rebalance where no other rank is involved: count, solve and assign.
#include "xla_ffi/balancer.h"

#include <vector>

#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {
namespace {

ffi::Error RebalanceImpl(int64_t ep_size, int64_t positions, ffi::AnyBuffer indices,
                         IntBuffer phy2log, IntBuffer log2phy, IntBuffer r2o, IntResult physical,
                         IntResult position, IntResult slot_counts, IntResult quota,
                         IntResult max_load, IntResult lower_bound, IntResult status,
                         IntResult /*workspace*/) {
  const auto call = CheckRebalance(ep_size, positions, indices, phy2log, log2phy, r2o, position,
                                   slot_counts, quota, max_load, lower_bound, status);
  if (call.has_error()) return call.error();
  const Problem& p = call->problem;
  const Sources sources = {1, p.n_logical + 1};
  std::vector<int32_t> counts(sources.row);
  const int32_t rank = 0;
  return WithIndexType(indices.element_type(), [&](auto* type) {
    auto* tokens = static_cast<decltype(type)>(indices.untyped_data());
    for (int64_t b = 0; b < call->batch; ++b) {
      const int64_t first = b * call->n_tokens;
      Count(tokens + first, call->n_tokens, p.n_logical, counts.data());
      SolveOperands in = BatchElement(p, sources, call->in, b);
      in.loads = counts.data();
      const SolveResults split = BatchElement(p, call->out, b);
      Solve(p, sources, in, split);
      AssignResults out = {physical->typed_data() + first, nullptr, nullptr};
      if (call->positions) {
        out.position = position->typed_data() + first;
        out.slot_counts = slot_counts->typed_data() + b * p.n_physical;
      }
      Assign(p, sources, {counts.data(), split.quota, in.log2phy, &rank}, /*proportional=*/false,
             tokens + first, call->n_tokens, out);
    }
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RebalanceCpu, RebalanceImpl, RebalanceBinding());

}  // namespace lplb
