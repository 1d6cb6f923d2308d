// assign: which slot serves every token of one source rank.
#include "xla_ffi/assignment.h"

#include <algorithm>
#include <vector>

#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {

template <typename Index>
void Assign(const Problem& problem, const Sources& sources, const AssignOperands& in,
            bool proportional, const Index* indices, int64_t n_tokens, const AssignResults& out) {
  const int32_t n_logical = problem.n_logical;
  std::vector<Route> routes(n_logical);
  for (int32_t e = 0; e < n_logical; ++e) {
    routes[e] = SlotsOf(problem, in.phy2log, in.log2phy, e);
    routes[e].keep =
        KeepOf(problem, sources, in.counts, in.quota, *in.rank, proportional, e, routes[e]);
  }
  std::vector<int32_t> seen(n_logical);
  for (int64_t i = 0; i < n_tokens; ++i) {
    const int32_t expert = ExpertOf(indices[i], n_logical);
    int32_t slot = -1;
    int32_t position = -1;
    if (expert >= 0 && expert < n_logical) {
      const Route& route = routes[expert];
      const int32_t ordinal = seen[expert]++;
      const bool stays = ordinal < route.keep;
      slot = stays ? route.home : route.replica;
      if (slot >= 0) position = stays ? ordinal : ordinal - route.keep;
    }
    out.physical[i] = slot;
    if (out.position != nullptr) out.position[i] = position;
  }
  if (out.slot_counts == nullptr) return;
  std::fill_n(out.slot_counts, problem.n_physical, 0);
  for (int32_t e = 0; e < n_logical; ++e) {
    const int32_t stays = std::min(routes[e].keep, seen[e]);
    if (routes[e].home >= 0) out.slot_counts[routes[e].home] += stays;
    if (routes[e].replica >= 0) out.slot_counts[routes[e].replica] += seen[e] - stays;
  }
}

template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const int32_t*,
                     int64_t, const AssignResults&);
template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const int64_t*,
                     int64_t, const AssignResults&);
template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const uint8_t*,
                     int64_t, const AssignResults&);
template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const uint16_t*,
                     int64_t, const AssignResults&);

namespace {

ffi::Error RunAssign(const AssignCall& call) {
  const Problem& p = call.problem;
  return WithIndexType(call.tokens.type, [&](auto* type) {
    auto* indices = static_cast<decltype(type)>(call.tokens.indices);
    for (int64_t b = 0; b < call.batch; ++b) {
      Assign(p, call.sources, BatchElement(p, call.sources, call.in, b), call.proportional,
             indices + b * call.tokens.n, call.tokens.n, ResultsOf(call.tokens, p, b));
    }
    return ffi::Error::Success();
  });
}

const Register assign({"lplb_assign", CpuHandler<AssignCall, RunAssign>});

}  // namespace
}  // namespace lplb
