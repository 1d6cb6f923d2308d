// assign: which slot serves every token of one source rank.
#include "xla_ffi/assignment.h"

#include <vector>

#include "xla_ffi/cpu/handlers.h"

namespace lplb {
namespace {

template <typename Index>
void Assign(const Problem& p, const Sources& sources, const AssignOperands& in, bool proportional,
            const Index* indices, int64_t n_tokens, int32_t* physical) {
  std::vector<Route> routes(p.n_logical);
  for (int32_t e = 0; e < p.n_logical; ++e) {
    routes[e] = RouteOf(p, sources, in, *in.rank, proportional, e);
  }
  for (int64_t i = 0; i < n_tokens; ++i) {
    const int32_t expert = ExpertOf(indices[i], p.n_logical);
    if (expert < 0 || expert == p.n_logical) {
      physical[i] = -1;
      continue;
    }
    Route& route = routes[expert];
    const bool stays = route.keep > 0;
    route.keep -= stays;
    physical[i] = stays ? route.home : route.replica;
  }
}

ffi::Error AssignImpl(int64_t ep_size, int64_t proportional, ffi::AnyBuffer indices,
                      IntBuffer counts, IntBuffer quota, IntBuffer log2phy, IntBuffer rank,
                      IntResult physical, IntResult /*workspace*/) {
  const auto call = CheckAssign(ep_size, indices, counts, quota, log2phy, rank);
  if (call.has_error()) return call.error();
  return WithIndexType(indices.element_type(), [&](auto* type) {
    auto* tokens = static_cast<decltype(type)>(indices.untyped_data());
    for (int64_t b = 0; b < call->batch; ++b) {
      const AssignOperands in = BatchElement(call->problem, call->sources, call->in, b);
      Assign(call->problem, call->sources, in, proportional != 0, tokens + b * call->n_tokens,
             call->n_tokens, physical->typed_data() + b * call->n_tokens);
    }
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(AssignCpu, AssignImpl, AssignBinding());

}  // namespace lplb
