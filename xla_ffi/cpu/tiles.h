// Where slots cost tiles: the tokens that fill the tiles of a plan. lplb_jax/reference explains it.
// No XLA, no Python.
#ifndef LPLB_XLA_FFI_CPU_TILES_H_
#define LPLB_XLA_FFI_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

#include "cuda/problem.h"
#include "xla_ffi/cpu/graph.h"
#include "xla_ffi/cpu/graph_waves.h"
#include "xla_ffi/cpu/waves.h"

namespace lplb {

// Along a topology: turns the tiles of every rank's replicated experts that are `away` into tokens,
// such that the largest rank load in tokens is least. `own` and `tiles` belong to every rank's own
// experts. `load` holds the rank loads if nothing moves, and on return the final ones.
inline void FillAlongTopology(const Problem& p, const Costs& costs, Waves& waves,
                              const std::vector<int32_t>& own, const std::vector<int32_t>& tiles,
                              std::vector<int32_t>& away, std::vector<int32_t>& load) {
  // In each column, at most one expert has tiles at both ends. The empty places of its last tile
  // are what can still move along the edge.
  std::vector<int32_t> room(own.size());
  std::vector<int32_t> cap(waves.dst().size());
  std::vector<int32_t> moved(cap.size());
  for (int32_t u = 0; u < p.group_size; ++u) {
    for (int32_t k = 0; k < p.n_redundant; ++k) {
      int32_t& mine = away[u * p.n_redundant + k];
      if (mine == 0) continue;
      const int32_t tokens = own[u * p.n_local + k];
      const int32_t home = tiles[u * p.n_local + k] - mine;
      const int32_t edge = waves.Edge(u, k % p.n_columns);
      mine = tokens - home * costs.TileRows();
      load[u] -= mine;
      load[waves.dst()[edge]] += mine;
      if (home > 0) cap[edge] = room[u * p.n_local + k] = costs.EmptyPlaces(tokens);
    }
  }
  waves.Run(load, cap, moved, waves.FirstTarget(load, cap));
  const std::vector<int32_t> more = TakeInOrder(p, waves, room, moved);
  for (size_t i = 0; i < away.size(); ++i) away[i] += more[i];
}

// Any placement: turns the tiles of all slots into tokens, in the same way. `load` is the ranks'
// base load, in tokens. Returns the largest load.
inline int64_t FillAnywhere(const Problem& p, const Costs& costs, const std::vector<int32_t>& total,
                            const int32_t* phy2log, std::vector<int64_t> load, int32_t* quota) {
  std::vector<int32_t> held(p.n_physical, -1);
  for (int32_t i = 0; i < p.n_physical; ++i) {
    if (quota[i] > 0) held[i] = phy2log[i];
  }
  const ReplicaGraph graph(p.ep_size, p.n_logical, p.slots_per_rank, held.data());
  std::vector<int32_t> room(p.n_logical);
  for (int32_t e = 0; e < p.n_logical; ++e) room[e] = costs.EmptyPlaces(total[e]);
  GraphWaves waves(graph);
  waves.Start(room.data());
  const auto tokens_of = [&](size_t cell) {
    return int64_t{costs.TileRows()} * quota[graph.slot[cell]] - waves.tokens()[cell];
  };
  std::vector<int64_t> least = load;  // with all empty places that a rank can have
  for (int32_t e = 0; e < p.n_logical; ++e) {
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
      load[graph.rank[c]] += tokens_of(c);
      least[graph.rank[c]] += int64_t{costs.TileRows()} * quota[graph.slot[c]] - room[e];
    }
  }
  const int64_t sum = std::accumulate(load.begin(), load.end(), int64_t{0});
  const int64_t bound =
      std::max(CeilDiv(sum, p.ep_size), *std::max_element(least.begin(), least.end()));
  // More empty places mean fewer tokens.
  std::transform(load.begin(), load.end(), waves.load().begin(), std::negate<>());
  waves.HandOut(-bound);
  for (size_t c = 0; c < graph.slot.size(); ++c) {
    quota[graph.slot[c]] = static_cast<int32_t>(tokens_of(c));
  }
  return -*std::min_element(waves.load().begin(), waves.load().end());
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_TILES_H_
