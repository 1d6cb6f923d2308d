// Any placement whose slots cost tiles, as device functions that the kernels compose: SolveTiles in
// the place of SolveGraph. lplb_jax/reference/graph.py is the specification.
#ifndef LPLB_CUDA_GRAPH_TILES_CUH_
#define LPLB_CUDA_GRAPH_TILES_CUH_

#include "cuda/graph_solver.cuh"

namespace lplb::cuda {

// The totals of tokens, as tiles or as the empty places in those.
enum class Unit { kTiles, kEmptyPlaces };

template <Unit unit, typename Totals>
struct TotalsIn {
  const Totals& tokens;
  const Costs& costs;

  __device__ __forceinline__ int2 operator[](int32_t expert) const {
    const int2 total = tokens[expert];
    if constexpr (unit == Unit::kTiles) return {costs.TilesOf(total.x), total.y};
    return {costs.EmptyPlaces(total.x), 0};
  }
};

// The ranks' base loads, in tokens.
struct BaseTokens {
  Costs costs;

  __device__ __forceinline__ int64_t operator[](int32_t rank) const {
    return int64_t{max(costs.base_load[rank], 0)} * costs.tile;
  }
};

// Tokens up to which a rank's base load is small, and up to which all others of a rank are.
constexpr int32_t kSmallShare = kInt32Max / 2;

// Adds the ranks' base loads in tiles to their loads, which were 0. A barrier must follow. Returns
// whether those that the thread added are small; a status bit is set if one is negative.
template <typename Threads>
__device__ __forceinline__ bool AddBase(const Problem& p, const Costs& costs,
                                        const GraphMemory& graph) {
  bool small = true;
#pragma unroll 1
  for (int32_t r = threadIdx.x; r < p.ep_size; r += Threads::Size()) {
    const int32_t given = costs.base_load[r];
    if (given < 0) atomicOr(graph.status, kNegativeLoad);
    atomicAdd(&graph.load[r], max(given, 0));
    small &= given <= kSmallShare / costs.tile;
  }
  return small;
}

// Leaves to every expert the cells that have tiles, and writes those of all slots to `quota`.
// Ranks' loads become what is left to hand out: no empty places yet, so many tokens less than none.
// Behind a barrier; ends with one.
template <int kWords, typename Threads, typename Tiles>
__device__ __forceinline__ void KeepFilled(const Problem& p, const Tiles& tiles, int32_t tile,
                                           const GraphMemory& graph, int32_t* quota) {
  const int32_t slot_words = GraphMemory::SlotWords(p);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    const uint32_t packed = graph.of_slot[i];
    quota[i] = QuotaOf(tiles, graph, i);
    if (quota[i] > 0 || ExpertIn(packed) == kNoExpert) continue;
    const int32_t rank = p.by_slots.Quotient(i);
    atomicAnd(&graph.mask[ExpertIn(packed) * kWords + (rank >> 5)], ~(1u << (rank & 31)));
    graph.of_slot[i] = kNoExpert;
  }
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.ep_size * slot_words; i += Threads::Size()) {
    graph.is_shared[i] = 0;
  }
#pragma unroll 1
  for (int32_t r = threadIdx.x; r < p.ep_size; r += Threads::Size()) {
    // Modulo 2³²: with the empty places it is in range.
    graph.load[r] = static_cast<int32_t>(0u - static_cast<uint32_t>(graph.load[r]) * tile);
    graph.loose[r] = 0;
  }
  if (threadIdx.x == 0) *graph.n_cells = 0;
  Threads::Sync();
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
    const int32_t n_hosts = HostsOf<kWords>(graph, e);
    if (n_hosts > 1) graph.first[e] = FetchAdd(graph.n_cells, n_hosts);
  }
  MarkShared<kWords, Threads>(p, graph, slot_words);
  Threads::Sync();
  Threads::Sync();  // As in ClusterKernel.
  NumberCells<kWords, Threads>(p, graph, slot_words);
  Threads::Sync();
}

// Hands out the empty places of the tiles that the cells have, and writes the tokens of all slots
// to `quota`, every thread those of its slots. Returns the largest load in tokens. Behind a
// barrier.
template <int kWords, typename Threads, typename Totals>
__device__ inline int32_t FillTiles(const Problem& p, const Totals& totals, const Costs& costs,
                                    const GraphMemory& graph, int32_t* quota) {
  const TotalsIn<Unit::kTiles, Totals> tiles = {totals, costs};
  const TotalsIn<Unit::kEmptyPlaces, Totals> room = {totals, costs};
  KeepFilled<kWords, Threads>(p, tiles, costs.tile, graph, quota);
  StartSplit<Threads, /*kHandOut=*/true>(p, room, nullptr, graph);
  Threads::Sync();
  if (threadIdx.x < RankTeam<kWords>::Size(p)) {
    int32_t load[kWords];
    ValuesOfRanks<kWords>(p, graph.load, 0, load);
#pragma unroll
    for (int w = 0; w < kWords; ++w) load[w] = -load[w];
    const int32_t target = HandOut<kWords>(p, graph, -FirstTarget(p, graph, load));
    if (threadIdx.x == 0) *graph.target = -target;
    RankTeam<kWords>::SyncLast(RankTeam<kWords>::Size(p));
  }
  Threads::Sync();
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    if (quota[i] == 0) continue;
    const uint32_t packed = graph.of_slot[i];
    if (CellIn(packed) == kNoNumber) graph.home[ExpertIn(packed)] = i;
    quota[i] = (quota[i] - 1) * costs.tile + (costs.tile - QuotaOf(room, graph, i));
  }
  return *graph.target;
}

// What SolveTiles finds.
struct TileProof {
  Proof tiles;
  int32_t max_tokens;
};

// Like SolveGraph, in tiles, and then in tokens, which FillTiles writes to `quota` [n_physical].
// Experts are then left with the cells that serve any. AddBase must have been called, which
// returned `small_base`. A barrier must follow.
template <int kWords, typename Threads, typename Totals>
__device__ inline TileProof SolveTiles(const Problem& p, const Totals& totals, const Costs& costs,
                                       bool small_base, const GraphMemory& graph, int32_t* quota) {
  const TotalsIn<Unit::kTiles, Totals> tiles = {totals, costs};
  const bool small = StartSplit<Threads>(p, tiles, nullptr, graph, kSmallShare / costs.tile);
  int32_t status = 0;
  if (Threads::Any(!small || !small_base)) {
    status =
        LargeLoads<Threads>(p.ep_size, p.slots_per_rank, totals, graph.of_slot, BaseTokens{costs});
    if (status != 0) atomicOr(graph.status, status);
    status = Threads::Any(status & kLoadOverflow);
  }
  TileProof proof = {{kInt32Max, 0}, kInt32Max};
  if (status != 0) {
    StayHome<kWords, Threads>(p.n_logical, totals, graph);
  } else {
    const int32_t most = BalanceCells<kWords, Threads>(p, graph);
    proof = {{most, most}, most};
    if (costs.tile > 1) {
      proof.max_tokens = FillTiles<kWords, Threads>(p, totals, costs, graph, quota);
      return proof;
    }
  }
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    quota[i] = QuotaOf(totals, graph, i);
  }
  return proof;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_TILES_CUH_
