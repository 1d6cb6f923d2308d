// solve: the exact integer solver. Same phases and order as lplb_jax/reference/solver.py and
// cuda/solver.cu, so that all three give the same bits.
#include "xla_ffi/solver.h"

#include <algorithm>
#include <vector>

#include "xla_ffi/cpu/graph.h"
#include "xla_ffi/cpu/graph_waves.h"
#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/steps.h"
#include "xla_ffi/cpu/tiles.h"
#include "xla_ffi/cpu/waves.h"

namespace lplb {
namespace {

void SolveGroup(const Problem& p, const SolveOperands& in, const std::vector<int64_t>& total,
                const std::vector<bool>& negative, const std::vector<int64_t>& base_load, int32_t g,
                int32_t status, const SolveResults& out, const Costs& costs) {
  const int32_t n_ranks = p.group_size;
  const int32_t n_columns = p.n_columns;
  const int32_t n_local = p.n_local;
  const int32_t n_redundant = p.n_redundant;
  const int32_t slots = p.slots_per_rank;
  const int64_t first_slot = static_cast<int64_t>(g) * n_ranks * slots;

  std::vector<int32_t> own(static_cast<size_t>(n_ranks) * n_local);
  std::vector<int64_t> base(n_ranks);  // With what ranks have anyway, in tokens.
  std::vector<int64_t> column(static_cast<size_t>(n_ranks) * n_columns);
  Waves waves(n_ranks, n_columns, in.r2o);
  bool overflow = false;
  for (int32_t r = 0; r < n_ranks; ++r) {
    base[r] = base_load[g * n_ranks + r] * costs.TileRows();
    for (int32_t k = 0; k < n_local; ++k) {
      const int32_t expert = std::clamp(in.phy2log[first_slot + r * slots + k], 0, p.n_logical - 1);
      overflow |= total[expert] > kInt32Max;
      if (negative[expert]) status |= kNegativeLoad;
      own[r * n_local + k] = static_cast<int32_t>(std::min<int64_t>(total[expert], kInt32Max));
      base[r] += own[r * n_local + k];
      if (k < n_redundant && waves.dst()[waves.Edge(r, k % n_columns)] != r) {
        column[waves.Edge(r, k % n_columns)] += own[r * n_local + k];
      }
    }
  }
  // A plan's rank loads never pass this sum, so where it fits nothing in the waves overflows.
  for (int32_t v = 0; v < n_ranks; ++v) {
    int64_t most = base[v];
    for (int32_t d = 0; d < n_columns; ++d) {
      most += column[waves.Edge(in.r2o[waves.Edge(v, d)], d)];
    }
    overflow |= most > kInt32Max;
  }

  if (overflow) status |= kLoadOverflow;
  if (Misplaced(p, in, g)) status |= kBadPlacement;
  out.status[g] = status;

  std::vector<int32_t> load(n_ranks);
  std::vector<int32_t> cap(column.size());
  std::vector<int32_t> moved(column.size());
  std::vector<int32_t> away(static_cast<size_t>(n_ranks) * n_redundant);
  int32_t most = 0;
  int32_t most_tokens = 0;
  if (overflow) {
    most = most_tokens = kInt32Max;
    out.lower_bound[g] = 0;
  } else if (costs.TileRows() == 1) {
    std::copy(base.begin(), base.end(), load.begin());
    std::copy(column.begin(), column.end(), cap.begin());
    out.lower_bound[g] = waves.Run(load, cap, moved, waves.FirstTarget(load, cap));
    most = most_tokens = *std::max_element(load.begin(), load.end());
    away = TakeInOrder(p, waves, own, moved);
  } else {
    std::vector<int32_t> tiles(own.size());
    for (int32_t r = 0; r < n_ranks; ++r) {
      load[r] = static_cast<int32_t>(base_load[g * n_ranks + r]);
      for (int32_t k = 0; k < n_local; ++k) {
        const int32_t mine = tiles[r * n_local + k] = costs.TilesOf(own[r * n_local + k]);
        load[r] += mine;
        if (k >= n_redundant) continue;
        const int32_t edge = waves.Edge(r, k % n_columns);
        if (waves.dst()[edge] != r) cap[edge] += mine;
      }
    }
    out.lower_bound[g] = waves.Run(load, cap, moved, waves.FirstTarget(load, cap));
    most = *std::max_element(load.begin(), load.end());
    away = TakeInOrder(p, waves, tiles, moved);
    std::copy(base.begin(), base.end(), load.begin());
    FillAlongTopology(p, costs, waves, own, tiles, away, load);
    most_tokens = *std::max_element(load.begin(), load.end());
  }
  out.max_load[g] = most;
  if (costs.max_tokens != nullptr) costs.max_tokens[g] = most_tokens;
  WriteQuotas(p, waves, own, away, out.quota + first_slot);
}

// Any placement: one group of all ranks.
void SolveAny(const Problem& p, const SolveOperands& in, const std::vector<int64_t>& total,
              const std::vector<bool>& negative, const std::vector<int64_t>& base_load,
              int32_t status, const SolveResults& out, const Costs& costs, const int32_t* start) {
  const ReplicaGraph graph(p.ep_size, p.n_logical, p.slots_per_rank, in.phy2log);
  std::vector<int32_t> loads(p.n_logical);
  std::vector<int64_t> base_tokens(p.ep_size);
  for (int32_t r = 0; r < p.ep_size; ++r) base_tokens[r] = base_load[r] * costs.TileRows();
  std::vector<int64_t> most = base_tokens;
  bool overflow = false;
  for (int32_t e = 0; e < p.n_logical; ++e) {
    // Loads of experts without a slot reach no rank, and only make the placement a wrong one.
    if (negative[e] && graph.Hosts(e) > 0) status |= kNegativeLoad;
    loads[e] = static_cast<int32_t>(std::min<int64_t>(total[e], kInt32Max));
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
      overflow |= total[e] > kInt32Max;
      most[graph.rank[c]] += loads[e];
    }
  }
  // A plan's rank loads never pass this sum.
  for (const int64_t load : most) overflow |= load > kInt32Max;
  if (overflow) {
    status |= kLoadOverflow;
    out.max_load[0] = kInt32Max;
    out.lower_bound[0] = 0;
    if (costs.max_tokens != nullptr) costs.max_tokens[0] = kInt32Max;
    graph.WriteHomeQuotas(in.log2phy, p.max_replicas, loads.data(), p.n_physical, out.quota);
  } else {
    GraphWaves waves(graph);
    std::vector<int32_t> tiles(loads);
    for (int32_t& of_expert : tiles) of_expert = costs.TilesOf(of_expert);
    const int64_t target = waves.Start(tiles.data(), base_load.data());
    if (start != nullptr) waves.TakeSplit(start);
    int64_t largest = waves.Finish(target);
    out.max_load[0] = out.lower_bound[0] = static_cast<int32_t>(largest);
    waves.WriteQuotas(out.quota, p.n_physical);
    if (costs.TileRows() > 1) {
      largest = FillAnywhere(p, costs, loads, in.phy2log, std::move(base_tokens), out.quota);
    }
    if (costs.max_tokens != nullptr) costs.max_tokens[0] = static_cast<int32_t>(largest);
  }
  if (!graph.Agrees(in.log2phy, p.max_replicas)) status |= kBadPlacement;
  out.status[0] = status;
}

}  // namespace

void Solve(const Problem& p, const Sources& sources, const SolveOperands& in,
           const SolveResults& out, const Costs& costs, const int32_t* start) {
  std::vector<int64_t> total(p.n_logical);
  std::vector<bool> negative(p.n_logical);
  int32_t status = 0;
  for (int32_t s = 0; s < sources.n_sources; ++s) {
    const int32_t* row = in.loads + static_cast<int64_t>(s) * sources.row;
    for (int32_t e = 0; e < p.n_logical; ++e) {
      if (row[e] < 0) negative[e] = true;
      total[e] += std::max(row[e], 0);
    }
    if (sources.row > p.n_logical && row[p.n_logical] != 0) status |= kInvalidIndex;
  }
  std::vector<int64_t> base_load(p.ep_size);
  std::vector<int32_t> base_status(p.n_groups, status);
  for (int32_t r = 0; r < p.ep_size && costs.base_load != nullptr; ++r) {
    base_load[r] = std::max(costs.base_load[r], 0);
    if (costs.base_load[r] < 0) base_status[r / p.group_size] |= kNegativeLoad;
  }
  if (p.n_columns == 0) {
    return SolveAny(p, in, total, negative, base_load, base_status[0], out, costs, start);
  }
  for (int32_t g = 0; g < p.n_groups; ++g) {
    SolveGroup(p, in, total, negative, base_load, g, base_status[g], out, costs);
  }
}

namespace {

ffi::Error RunSolve(const SolveCall& call) {
  LPLB_RETURN_IF_ERROR(CheckTopology(call.problem, call.batch, call.in.r2o));
  for (int64_t b = 0; b < call.batch; ++b) {
    Solve(call.problem, call.sources, BatchElement(call.problem, call.sources, call.in, b),
          BatchElement(call.problem, call.out, b));
  }
  return ffi::Error::Success();
}

ffi::Error RunSolveCosts(const SolveCostsCall& call) {
  LPLB_RETURN_IF_ERROR(CheckTopology(call.problem, call.batch, call.in.r2o));
  for (int64_t b = 0; b < call.batch; ++b) {
    Solve(call.problem, call.sources, BatchElement(call.problem, call.sources, call.in, b),
          BatchElement(call.problem, call.out, b), BatchElement(call.problem, call.costs, b));
  }
  return ffi::Error::Success();
}

const Register solve({"lplb_solve", CpuHandler<SolveCall, RunSolve>});
const Register solve_costs({"lplb_solve_costs", CpuHandler<SolveCostsCall, RunSolveCosts>});

}  // namespace
}  // namespace lplb
