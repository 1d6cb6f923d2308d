// ipm: the interior point, as specified by lplb_jax/reference/ipm.py.
#include "xla_ffi/ipm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "xla_ffi/cpu/graph_waves.h"
#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/interior_point.h"
#include "xla_ffi/cpu/networks.h"
#include "xla_ffi/cpu/steps.h"
#include "xla_ffi/cpu/waves.h"

namespace lplb {
namespace {

// The ranks' loads and the edges' capacities of one group. Sum has a larger range than Load, so
// that an overflow shows.
template <typename Load, typename Sum>
struct Group {
  std::vector<Load> own;  // [group_size, n_local]
  std::vector<Sum> base;
  std::vector<Sum> cap;
  std::vector<Sum> most;  // A rank's load plus all that it could receive.

  Group(const Problem& p, const Waves& waves, const int32_t* r2o, std::vector<Load> loads)
      : own(std::move(loads)), base(p.group_size), cap(p.group_size * p.n_columns) {
    for (int32_t r = 0; r < p.group_size; ++r) {
      for (int32_t k = 0; k < p.n_local; ++k) {
        base[r] += own[r * p.n_local + k];
        const int32_t edge = waves.Edge(r, k % p.n_columns);
        if (k < p.n_redundant && waves.dst()[edge] != r) cap[edge] += own[r * p.n_local + k];
      }
    }
    for (int32_t v = 0; v < p.group_size; ++v) {
      Sum sum = base[v];
      for (int32_t d = 0; d < p.n_columns; ++d) {
        sum += cap[waves.Edge(r2o[waves.Edge(v, d)], d)];
      }
      most.push_back(sum);
    }
  }
};

template <typename Load>
std::vector<float> ToFloat(const std::vector<Load>& values) {
  return std::vector<float>(values.begin(), values.end());
}

// The interior point's best plan along the topology, and its best cut.
struct Found {
  std::vector<float> moved;
  std::vector<bool> cut;
};

Found FindBest(const Problem& p, const Waves& waves, std::vector<float> base,
               std::vector<float> cap, const std::vector<float>& weights) {
  std::vector<int32_t> u(cap.size());
  for (size_t e = 0; e < u.size(); ++e) u[e] = static_cast<int32_t>(e) / p.n_columns;
  EdgeNetwork network(std::move(base), std::move(cap), weights, std::move(u), waves.dst());
  std::vector<bool> cut = InteriorPoint(network, weights).Run();
  return {network.Moved(), std::move(cut)};
}

// The number of tokens that cannot leave the cut.
int64_t TokensOf(const Problem& p, const Waves& waves, const std::vector<bool>& cut,
                 const std::vector<int32_t>& base, const std::vector<int32_t>& cap) {
  int64_t tokens = 0;
  for (int32_t r = 0; r < p.group_size; ++r) {
    if (!cut[r]) continue;
    tokens += base[r];
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t edge = waves.Edge(r, d);
      if (!cut[waves.dst()[edge]]) tokens -= cap[edge];
    }
  }
  return tokens;
}

// The least load / weight at which the ranks of the cut can hold `tokens` tokens.
float LeastValue(int64_t tokens, const std::vector<bool>& cut, const std::vector<float>& weights) {
  return LeastFloat([&](float value) {
    int64_t left = tokens;
    for (size_t r = 0; r < cut.size(); ++r) {
      if (cut[r]) left -= TokenLimit(value, weights[r]);
    }
    return left <= 0;
  });
}

// The load / weight that a cut proves for real loads. for_kept(function) calls function(part, load)
// for each load that cannot leave the cut. Loads are added in units of a power of two chosen so
// that a part's sum stays below 2³⁰, and are never rounded up.
template <typename ForKept>
float ProvenByUnits(const std::vector<bool>& cut, const std::vector<float>& weights,
                    int32_t n_parts, ForKept&& for_kept) {
  std::vector<float> sum(n_parts);
  for_kept([&](int32_t part, float load) { sum[part] += load; });
  const int32_t exponent = 28 - std::ilogb(std::max(*std::max_element(sum.begin(), sum.end()),
                                                    std::numeric_limits<float>::min()));
  int64_t units = 0;
  for_kept([&](int32_t, float load) { units += static_cast<int64_t>(std::ldexp(load, exponent)); });
  const int32_t n_ranks = static_cast<int32_t>(cut.size());
  float weight = 0;
  for (int32_t r = 0; r < n_ranks; ++r) weight += cut[r] ? weights[r] : 0;
  return std::ldexp(Provable(static_cast<float>(units), weight, n_ranks), -exponent);
}

template <typename Load>
float LargestShare(const std::vector<Load>& load, const std::vector<float>& weights) {
  float largest = 0;
  for (size_t r = 0; r < load.size(); ++r) {
    largest = std::max(largest, static_cast<float>(load[r]) / weights[r]);
  }
  return largest;
}

// Whether some rank's load, or load / weight, could exceed kMostLoad.
bool TooMuch(const std::vector<float>& most, const std::vector<float>& weights) {
  const float largest = *std::max_element(most.begin(), most.end());
  return !(std::max(LargestShare(most, weights), largest) <= kMostLoad);
}

void Put(float value, int32_t* out) { memcpy(out, &value, sizeof(value)); }

// Reports that nothing is divided and nothing proven. Returns status bits.
int32_t GiveUp(const IpmOptions& options, int32_t* max_load, int32_t* lower_bound) {
  *lower_bound = 0;  // Also as a float.
  *max_load = kInt32Max;
  if (options.floats) {
    Put(std::numeric_limits<float>::infinity(), max_load);
  } else if (options.weighted) {
    Put(static_cast<float>(kInt32Max), max_load);
  }
  return kLoadOverflow;
}

// Integer loads on ranks of equal speed: proves, repairs, and returns status bits. `target` is a
// proven bound, and `kept` the tokens that provably cannot leave the cut. balance(target) runs the
// waves and returns the target reached.
template <typename Load, typename Balance>
int32_t FinishEqual(bool repair, const std::vector<bool>& cut, int64_t kept, int32_t target,
                    const std::vector<Load>& load, Balance&& balance, int32_t* max_load,
                    int32_t* lower_bound) {
  const int64_t size = std::max<int64_t>(std::count(cut.begin(), cut.end(), true), 1);
  *lower_bound = std::max(target, static_cast<int32_t>(CeilDiv(std::max<int64_t>(kept, 0), size)));
  if (repair) *lower_bound = static_cast<int32_t>(balance(*lower_bound));
  *max_load = static_cast<int32_t>(*std::max_element(load.begin(), load.end()));
  return Converged(*max_load, *lower_bound) ? 0 : kNotConverged;
}

// The same for ranks of different speeds. Every rank has its own target: what the least proven load
// / weight allows it.
template <typename Load, typename Balance>
int32_t FinishWeighted(bool repair, const std::vector<bool>& cut, int64_t kept,
                       const std::vector<float>& weights, std::vector<Load>& load,
                       Balance&& balance, int32_t* max_load, int32_t* lower_bound) {
  float value = LeastValue(kept, cut, weights);
  if (repair) {
    const auto count_from = [&](int32_t sign) {
      for (size_t r = 0; r < load.size(); ++r) load[r] += sign * TokenLimit(value, weights[r]);
    };
    count_from(-1);
    balance(0, [&](const std::vector<bool>& stuck) {
      count_from(1);
      int64_t tokens = 0;
      for (size_t r = 0; r < load.size(); ++r) tokens += stuck[r] ? load[r] : 0;
      value = LeastValue(tokens, stuck, weights);
      count_from(-1);
    });
    count_from(1);
  }
  const float largest = LargestShare(load, weights);
  value = std::min(value, largest);
  Put(largest, max_load);
  Put(value, lower_bound);
  return Converged(largest, value) ? 0 : kNotConverged;
}

// Evaluates real quotas and their bound. Returns status bits.
int32_t FinishReal(const Problem& p, float bound, const std::vector<float>& weights,
                   const float* quota, int32_t* max_load, int32_t* lower_bound) {
  std::vector<float> load(p.group_size);
  for (int32_t i = 0; i < p.group_size * p.slots_per_rank; ++i) {
    load[i / p.slots_per_rank] += quota[i];
  }
  const float largest = LargestShare(load, weights);
  bound = std::min(largest, bound);
  Put(largest, max_load);
  Put(bound, lower_bound);
  return Converged(largest, bound) ? 0 : kNotConverged;
}

// Solves integer loads. Returns status bits.
int32_t SolveGroup(const Problem& p, const IpmOptions& options, const int32_t* r2o,
                   std::vector<int32_t> own, bool overflow, const std::vector<float>& weights,
                   int32_t* quota, int32_t* max_load, int32_t* lower_bound) {
  Waves waves(p.group_size, p.n_columns, r2o);
  const Group<int32_t, int64_t> group(p, waves, r2o, std::move(own));
  std::vector<int32_t> moved(group.cap.size());
  if (overflow || *std::max_element(group.most.begin(), group.most.end()) > kInt32Max) {
    WriteQuotas(p, waves, group.own, TakeInOrder(p, waves, group.own, moved), quota);
    return GiveUp(options, max_load, lower_bound);
  }
  const std::vector<int32_t> base(group.base.begin(), group.base.end());
  const std::vector<int32_t> cap(group.cap.begin(), group.cap.end());
  const auto best = FindBest(p, waves, ToFloat(base), ToFloat(cap), weights);
  std::vector<int32_t> load = base;
  for (int32_t e = 0; e < static_cast<int32_t>(cap.size()); ++e) {
    moved[e] = RoundTokens(best.moved[e], cap[e]);
    load[e / p.n_columns] -= moved[e];
    load[waves.dst()[e]] += moved[e];
  }
  const int64_t kept = TokensOf(p, waves, best.cut, base, cap);
  const auto balance = [&](auto&&... how) { return waves.Run(load, cap, moved, how...); };
  const int32_t status =
      options.weighted ? FinishWeighted(options.repair, best.cut, kept, weights, load, balance,
                                        max_load, lower_bound)
                       : FinishEqual(options.repair, best.cut, kept, waves.FirstTarget(base, cap),
                                     load, balance, max_load, lower_bound);
  WriteQuotas(p, waves, group.own, TakeInOrder(p, waves, group.own, moved), quota);
  return status;
}

// Solves real loads. Returns status bits.
int32_t SolveGroup(const Problem& p, const IpmOptions& options, const int32_t* r2o,
                   std::vector<float> own, bool overflow, const std::vector<float>& weights,
                   float* quota, int32_t* max_load, int32_t* lower_bound) {
  Waves waves(p.group_size, p.n_columns, r2o);
  const Group<float, float> group(p, waves, r2o, std::move(own));
  std::vector<float> moved(group.cap.size());
  if (overflow || TooMuch(group.most, weights)) {
    WriteQuotas(p, waves, group.own, TakeInOrder(p, waves, group.own, moved), quota);
    return GiveUp(options, max_load, lower_bound);
  }
  auto best = FindBest(p, waves, group.base, group.cap, weights);
  WriteQuotas(p, waves, group.own, TakeInOrder(p, waves, group.own, best.moved), quota);
  const float bound = ProvenByUnits(best.cut, weights, p.group_size, [&](auto&& function) {
    for (int32_t i = 0; i < p.group_size * p.n_local; ++i) {
      const int32_t r = i / p.n_local;
      const int32_t k = i % p.n_local;
      const bool leaves =
          k < p.n_redundant && !best.cut[waves.dst()[waves.Edge(r, k % p.n_columns)]];
      if (best.cut[r] && !leaves) function(r, group.own[i]);
    }
  });
  return FinishReal(p, bound, weights, quota, max_load, lower_bound);
}

// The experts of any placement whose hosts are all in the cut.
std::vector<int32_t> Confined(const ReplicaGraph& graph, const std::vector<bool>& cut) {
  std::vector<int32_t> experts;
  for (int32_t e = 0; e < graph.n_logical; ++e) {
    bool confined = graph.Hosts(e) > 0;
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) confined &= cut[graph.rank[c]];
    if (confined) experts.push_back(e);
  }
  return experts;
}

// Deals an expert's whole tokens to its cells by their shares. The running sum up to each cell is
// the rounded running share.
void DealTokens(const ReplicaGraph& graph, const std::vector<float>& shares,
                const std::vector<int32_t>& total, std::vector<int64_t>& tokens) {
  for (int32_t e = 0; e < graph.n_logical; ++e) {
    float share = 0;
    int32_t given = 0;
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
      share += shares[c];
      const bool last = c + 1 == graph.first[e + 1];
      const int32_t upto =
          last ? total[e]
               : std::max(given, RoundTokens(share * static_cast<float>(total[e]), total[e]));
      tokens[c] = upto - given;
      given = upto;
    }
  }
}

// Solves any placement with integer loads, which are 0 for experts without a slot. Returns status
// bits.
int32_t SolveAnywhere(const Problem& p, const IpmOptions& options, const ReplicaGraph& graph,
                      const std::vector<int32_t>& total, const std::vector<float>& weights,
                      int32_t* quota, int32_t* max_load, int32_t* lower_bound) {
  HostNetwork network(graph, ToFloat(total), weights);
  const std::vector<bool> cut = InteriorPoint(network, weights).Run();
  GraphWaves waves(graph);
  const int32_t target = static_cast<int32_t>(waves.Start(total.data()));
  DealTokens(graph, network.Shares(), total, waves.tokens());
  std::fill(waves.load().begin(), waves.load().end(), 0);
  for (size_t c = 0; c < graph.rank.size(); ++c) waves.load()[graph.rank[c]] += waves.tokens()[c];
  int64_t kept = 0;
  for (const int32_t e : Confined(graph, cut)) kept += total[e];
  const auto balance = [&](auto&&... how) { return waves.Finish(how...); };
  const int32_t status = options.weighted
                             ? FinishWeighted(options.repair, cut, kept, weights, waves.load(),
                                              balance, max_load, lower_bound)
                             : FinishEqual(options.repair, cut, kept, target, waves.load(), balance,
                                           max_load, lower_bound);
  waves.WriteQuotas(quota, p.n_physical);
  return status;
}

// The same for real loads.
int32_t SolveAnywhere(const Problem& p, const IpmOptions&, const ReplicaGraph& graph,
                      const std::vector<float>& total, const std::vector<float>& weights,
                      float* quota, int32_t* max_load, int32_t* lower_bound) {
  HostNetwork network(graph, total, weights);
  const std::vector<bool> cut = InteriorPoint(network, weights).Run();
  std::fill_n(quota, p.n_physical, 0.0f);
  for (int32_t e = 0; e < graph.n_logical; ++e) {
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
      quota[graph.slot[c]] = network.Shares()[c] * total[e];
    }
  }
  const float bound = ProvenByUnits(cut, weights, p.n_logical, [&](auto&& function) {
    for (const int32_t e : Confined(graph, cut)) function(e, total[e]);
  });
  return FinishReal(p, bound, weights, quota, max_load, lower_bound);
}

// Whether some rank of any placement could exceed the range of its type. A `total` may already do
// so by itself.
bool MayOverflow(const ReplicaGraph& graph, const std::vector<int64_t>& total,
                 const std::vector<float>&) {
  std::vector<int64_t> most(graph.n_ranks);
  for (int32_t e = 0; e < graph.n_logical; ++e) {
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) most[graph.rank[c]] += total[e];
  }
  return *std::max_element(most.begin(), most.end()) > kInt32Max;
}

bool MayOverflow(const ReplicaGraph& graph, const std::vector<float>& total,
                 const std::vector<float>& weights) {
  std::vector<float> most(graph.n_ranks);
  for (int32_t e = 0; e < graph.n_logical; ++e) {
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) most[graph.rank[c]] += total[e];
  }
  return TooMuch(most, weights);
}

// Rank weights scaled to mean 1. If one is not a valid speed, all count as equal. None counts as
// less than kLeastWeight of the largest. Both cases set a status bit.
std::vector<float> Normalised(const Problem& p, const IpmOptions& options, const float* weights,
                              int32_t& status) {
  std::vector<float> result(p.group_size, 1);
  if (!options.weighted) return result;
  if (!std::all_of(weights, weights + p.group_size, IsSpeed)) {
    status |= kNotConverged;
    return result;
  }
  const float largest = *std::max_element(weights, weights + p.group_size);
  const float power = PowerOfTwo(-Exponent(largest));  // Their sum could overflow otherwise.
  const float least = kLeastWeight * (largest * power);
  float sum = 0;
  for (int32_t r = 0; r < p.group_size; ++r) {
    if (weights[r] * power < least) status |= kNotConverged;
    result[r] = std::max(weights[r] * power, least);
    sum += result[r];
  }
  const float mean = sum / static_cast<float>(p.group_size);
  for (float& weight : result) weight /= mean;
  return result;
}

template <typename Load, typename Sum>
void SolveOne(const Problem& p, const Sources& sources, const IpmOptions& options,
              const IpmOperands& in, const SolveResults& out) {
  const Load* loads = reinterpret_cast<const Load*>(in.solve.loads);
  std::vector<Sum> total(p.n_logical);
  std::vector<bool> negative(p.n_logical);
  int32_t shared_status = 0;
  for (int32_t s = 0; s < sources.n_sources; ++s) {
    const Load* row = loads + static_cast<int64_t>(s) * sources.row;
    for (int32_t e = 0; e < p.n_logical; ++e) {
      if (row[e] >= 0) {
        total[e] += row[e];
      } else {
        negative[e] = true;  // Also for NaN.
      }
    }
    if (sources.row > p.n_logical && row[p.n_logical] != 0) shared_status |= kInvalidIndex;
  }
  const std::vector<float> weights = Normalised(p, options, in.weights, shared_status);

  constexpr Sum kMost = std::numeric_limits<Load>::max();
  Load* quotas = reinterpret_cast<Load*>(out.quota);
  if (p.n_columns == 0) {
    const ReplicaGraph graph(p.ep_size, p.n_logical, p.slots_per_rank, in.solve.phy2log);
    std::vector<Load> loads(p.n_logical);
    for (int32_t e = 0; e < p.n_logical; ++e) {
      // Loads of experts without a slot reach no rank. They only make the placement invalid.
      if (graph.Hosts(e) == 0) continue;
      if (negative[e]) shared_status |= kNegativeLoad;
      loads[e] = static_cast<Load>(std::min(total[e], kMost));
    }
    if (MayOverflow(graph, total, weights)) {
      graph.WriteHomeQuotas(in.solve.log2phy, p.max_replicas, loads.data(), p.n_physical, quotas);
      shared_status |= GiveUp(options, out.max_load, out.lower_bound);
    } else {
      shared_status |=
          SolveAnywhere(p, options, graph, loads, weights, quotas, out.max_load, out.lower_bound);
    }
    if (!graph.Agrees(in.solve.log2phy, p.max_replicas)) shared_status |= kBadPlacement;
    out.status[0] = shared_status;
    return;
  }

  const int32_t slots = p.slots_per_rank;
  for (int32_t g = 0; g < p.n_groups; ++g) {
    const int64_t first_slot = static_cast<int64_t>(g) * p.group_size * slots;
    int32_t status = shared_status;
    bool overflow = false;
    std::vector<Load> own;
    for (int32_t r = 0; r < p.group_size; ++r) {
      for (int32_t k = 0; k < p.n_local; ++k) {
        const int32_t expert =
            std::clamp(in.solve.phy2log[first_slot + r * slots + k], 0, p.n_logical - 1);
        Sum load = total[expert];
        overflow |= load > kMost;
        load = std::min(load, kMost);
        if (negative[expert]) status |= kNegativeLoad;
        own.push_back(static_cast<Load>(load));
      }
    }
    status |= SolveGroup(p, options, in.solve.r2o, std::move(own), overflow, weights,
                         quotas + first_slot, &out.max_load[g], &out.lower_bound[g]);
    if (Misplaced(p, in.solve, g)) status |= kBadPlacement;
    out.status[g] = status;
  }
}

ffi::Error RunIpm(const IpmCall& call) {
  if (call.options.cusolverdx) return Invalid("factor: cuSolverDx is for GPUs");
  LPLB_RETURN_IF_ERROR(CheckTopology(call.problem, call.batch, call.in.solve.r2o));
  const auto solve = call.options.floats ? SolveOne<float, float> : SolveOne<int32_t, int64_t>;
  for (int64_t b = 0; b < call.batch; ++b) {
    solve(call.problem, call.sources, call.options,
          BatchElement(call.problem, call.sources, call.in, b),
          BatchElement(call.problem, call.out, b));
  }
  return ffi::Error::Success();
}

const Register ipm({"lplb_ipm", CpuHandler<IpmCall, RunIpm>});

}  // namespace
}  // namespace lplb
