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
    return int64_t{max(costs.base_load[rank], 0)} * costs.TileRows();
  }
};

// Tokens up to which a rank's base load is small, and up to which all others of a rank are.
constexpr int32_t kSmallShare = kInt32Max / 2;

// The ranks' base loads in tiles, for BuildGraph. The thread's first one is fetched at once.
class BaseTiles {
 public:
  __device__ __forceinline__ BaseTiles(const Problem& p, const Costs& costs)
      : base_load_(costs.base_load),
        most_(costs.by_tile.Quotient(kSmallShare)),
        first_(static_cast<int32_t>(threadIdx.x) < p.ep_size ? costs.base_load[threadIdx.x] : 0) {}

  __device__ __forceinline__ int32_t operator()(int32_t rank) {
    const int32_t given = rank == static_cast<int32_t>(threadIdx.x) ? first_ : base_load_[rank];
    small_ &= given <= most_;
    negative_ |= given < 0;
    return max(given, 0);
  }

  // Of those that were asked for: whether all are small, and a status bit if one is negative.
  __device__ __forceinline__ bool small() const { return small_; }
  __device__ __forceinline__ int32_t status() const { return negative_ ? kNegativeLoad : 0; }

 private:
  const int32_t* base_load_;
  int32_t most_;
  int32_t first_;
  bool small_ = true;
  bool negative_ = false;
};

// Writes the tiles of all slots to `tiles_of_slot` and takes the cells without any from their
// experts. Ranks' loads become what is left to hand out: no empty places yet, so many tokens less
// than none. Behind a barrier; another must follow.
template <int kWords, typename Threads, typename Tiles>
__device__ __forceinline__ void KeepFilled(const Problem& p, const Tiles& tiles, int32_t rows,
                                           const GraphMemory& graph, int32_t* tiles_of_slot) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    const uint32_t packed = graph.of_slot[i];
    tiles_of_slot[i] = QuotaOf(tiles, graph, i);
    if (tiles_of_slot[i] > 0 || CellIn(packed) == kNoNumber) continue;
    const int32_t rank = p.by_slots.Quotient(i);
    atomicAnd(&graph.mask[ExpertIn(packed) * kWords + (rank >> 5)], ~(1u << (rank & 31)));
  }
  // By other warps than the slots, if there are few.
#pragma unroll 1
  for (int32_t r = Threads::Size() - 1 - threadIdx.x; r < p.ep_size; r += Threads::Size()) {
    // Modulo 2³²: with the empty places it is in range.
    graph.load[r] = static_cast<int32_t>(0u - static_cast<uint32_t>(graph.load[r]) * rows);
    graph.loose[r] = 0;
  }
}

// After KeepFilled, divides the empty places of every expert evenly over its cells, of which the
// first get one more; all of them could be there. The cells that are left come before those that
// were taken from the expert, which stay empty: so each rank keeps its list. The only cell of an
// expert becomes its home. A barrier must follow.
template <int kWords, typename Threads, typename Room>
__device__ __forceinline__ void StartRoom(const Problem& p, const Room& room,
                                          const GraphMemory& graph, const int32_t* tiles_of_slot) {
  const int32_t slot_words = GraphMemory::SlotWords(p);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    const uint32_t packed = graph.of_slot[i];
    const uint32_t expert = ExpertIn(packed);
    if (expert == kNoExpert) continue;
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t all = room[expert].x;
    int32_t share = all;
    if (CellIn(packed) != kNoNumber) {
      const bool filled = tiles_of_slot[i] > 0;
      const int32_t n_hosts = HostsOf<kWords>(graph, expert);
      const int32_t before = PlaceOf<kWords>(graph.mask + expert * kWords, rank);
      // Mostly one or two, and a division would take longer.
      const int32_t each = n_hosts > 2 ? SmallDivisor(n_hosts).Quotient(all) : all >> n_hosts / 2;
      share = filled ? each + (before < all - each * n_hosts) : 0;
      const int32_t cell = filled ? graph.first[expert] + before
                                  : static_cast<int32_t>(CellIn(packed)) - before + n_hosts;
      if (filled) atomicAdd(&graph.loose[rank], all - share);
      if (filled && n_hosts == 1) graph.home[expert] = i;
      const uint32_t renumbered = expert | static_cast<uint32_t>(cell) << 16;
      const int32_t nth =
          NthShared(graph.is_shared + rank * slot_words, i - rank * p.slots_per_rank);
      graph.of_slot[i] = graph.shared[rank * p.slots_per_rank + nth] = renumbered;
      graph.slot[cell] = i;
      graph.tokens[cell] = share;
    }
    atomicAdd(&graph.load[rank], share);
  }
}

// Hands out the empty places of the tiles that the cells have: these become the cells' tokens, and
// the slots' tiles come into `tiles_of_slot`. Returns the largest load in tokens. Behind a barrier;
// ends with one.
template <int kWords, typename Threads, typename Totals>
__device__ inline int32_t FillTiles(const Problem& p, const Totals& totals, const Costs& costs,
                                    const GraphMemory& graph, int32_t* tiles_of_slot) {
  const TotalsIn<Unit::kTiles, Totals> tiles = {totals, costs};
  const TotalsIn<Unit::kEmptyPlaces, Totals> room = {totals, costs};
  const int32_t rows = costs.TileRows();
  KeepFilled<kWords, Threads>(p, tiles, rows, graph, tiles_of_slot);
  Threads::Sync();
  StartRoom<kWords, Threads>(p, room, graph, tiles_of_slot);
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
  return *graph.target;
}

// What SolveTiles finds.
struct TileProof {
  Proof tiles;
  int32_t max_tokens;
  int32_t filled_rows;  // of the tiles whose empty places are the cells' tokens; 0 if none are

  // The tokens of a shared expert's cell, of which the graph has `tokens`, in so many tiles.
  __device__ __forceinline__ int32_t TokensOf(int32_t tokens, int32_t tiles) const {
    if (filled_rows == 0) return tokens;
    return tiles > 0 ? (tiles - 1) * filled_rows + (filled_rows - tokens) : 0;
  }
};

// Like SolveGraph, in tiles, and then in tokens, which TileProof::TokensOf tells from those of the
// graph's cells and `tiles_of_slot` [n_physical]. Experts are then left with the cells that serve
// any. `small_base`: whether those of BaseTiles that the thread asked for are.
template <int kWords, typename Threads, typename Totals>
__device__ inline TileProof SolveTiles(const Problem& p, const Totals& totals, const Costs& costs,
                                       bool small_base, const GraphMemory& graph,
                                       int32_t* tiles_of_slot) {
  const TotalsIn<Unit::kTiles, Totals> tiles = {totals, costs};
  const bool small =
      StartSplit<Threads>(p, tiles, nullptr, graph, costs.by_tile.Quotient(p.safe_load / 2));
  int32_t status = 0;
  if (Threads::Any(!small || !small_base)) {
    status =
        LargeLoads<Threads>(p.ep_size, p.slots_per_rank, totals, graph.of_slot, BaseTokens{costs});
    if (status != 0) atomicOr(graph.status, status);
    status = Threads::Any(status & kLoadOverflow);
  }
  TileProof proof = {{kInt32Max, 0}, kInt32Max, 0};
  if (status != 0) {
    StayHome<kWords, Threads>(p.n_logical, totals, graph);
  } else {
    const int32_t most = BalanceCells<kWords, Threads>(p, graph);
    proof = {{most, most}, most, 0};
    if (costs.TileRows() > 1) {
      proof.max_tokens = FillTiles<kWords, Threads>(p, totals, costs, graph, tiles_of_slot);
      proof.filled_rows = costs.TileRows();
    }
  }
  return proof;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_TILES_CUH_
