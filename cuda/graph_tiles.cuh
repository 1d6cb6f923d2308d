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

// The ranks' base loads in tiles, for ClearGraph. The thread's first one is fetched at once.
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

// Threads that share work beside the waves: those that run none come first. If there are any, the
// others take no part, unless kAll.
template <int kWords, typename Threads, bool kAll = false>
struct Aside {
  int32_t number;  // of this thread; larger than all there are where it takes no part
  int32_t n;

  __device__ __forceinline__ explicit Aside(const Problem& p) {
    const int32_t n_team = RankTeam<kWords>::Size(p);
    const bool some_idle = n_team < Threads::Size();
    n = Threads::Size() - (some_idle && !kAll ? n_team : 0);
    number = static_cast<int32_t>(threadIdx.x) - (some_idle ? n_team : 0);
    if (number < 0) number = kAll ? number + n : kInt32Max / 2;
  }

  template <typename Use>
  __device__ __forceinline__ void ForEach(int32_t end, const Use& use) const {
#pragma unroll 1
    for (int32_t i = number; i < end; i += n) use(i);
  }
};

// Those that fill the tiles of cells. With more than 32 ranks, there are too many cells for the
// idle: two each took 0.6 µs longer on 64 ranks.
template <int kWords, typename Threads>
using Fillers = Aside<kWords, Threads, (kWords > 1)>;

// A shared expert's cell, before its tiles are filled: what does not depend on how many it has.
struct CellToFill {
  uint32_t expert;
  int32_t places;  // that are empty in the expert's tiles
  int32_t first;   // the expert's first cell
  int32_t n_hosts;
  int32_t nth;  // which of them this is
  PlacedSlot at;
  int32_t listed;  // in graph.shared

  CellToFill() = default;
  template <typename Room>
  __device__ __forceinline__ CellToFill(const Problem& p, const Room& room,
                                        const GraphMemory& graph, int32_t cell)
      : at(p, graph.slot[cell]) {
    const uint32_t place = graph.place[cell];
    expert = ExpertIn(graph.of_slot[at.slot]);
    places = room[expert].x;
    nth = place & 0xffff;
    n_hosts = place >> 16;
    first = cell - nth;
    const uint32_t* is_shared = graph.is_shared + at.rank * GraphMemory::SlotWords(p);
    listed = at.rank * p.slots_per_rank + NthShared(is_shared, at.k);
  }
};

// What StartRoom can do while the waves run: adds the empty places of experts on one rank to
// `load`, and reads the thread's first cell.
template <int kWords, typename Threads, typename Room>
__device__ __forceinline__ void PrepareRoom(const Problem& p, const Room& room,
                                            const GraphMemory& graph, int32_t* load,
                                            CellToFill& cell) {
  const Fillers<kWords, Threads> fillers(p);
  if (fillers.number < *graph.n_cells) cell = CellToFill(p, room, graph, fillers.number);
  Aside<kWords, Threads>(p).ForEach(p.n_physical, [&](int32_t i) {
    const uint32_t packed = graph.of_slot[i];
    if (ExpertIn(packed) == kNoExpert || CellIn(packed) != kNoNumber) return;
    atomicAdd(&load[p.by_slots.Quotient(i)], room[ExpertIn(packed)].x);
  });
}

// Divides the empty places of every shared expert evenly over its cells with tiles, of which the
// first get one more; all of them could be there. They become the tokens of `places`, whose ranks'
// loads become what is left to hand out: so many places less than tokens. The expert keeps these
// cells alone, which come first; its others share the last number, which has no places. So each
// rank keeps its list. The only cell of an expert becomes its home. Slots' tiles come into
// `tiles_of_slot`.
//
// Behind PrepareRoom, which read `cell`, and a barrier; another must follow. A cell's number
// becomes no larger, so where there are more than threads, it is enough that those of one turn
// wait.
template <int kWords, typename Threads, typename Room>
__device__ __forceinline__ void StartRoom(const Problem& p, const Room& room, int32_t rows,
                                          CellToFill& cell, const GraphMemory& graph,
                                          const GraphMemory& places, int32_t* tiles_of_slot) {
  const Fillers<kWords, Threads> fillers(p);
  const int32_t n_cells = *graph.n_cells;
#pragma unroll 1
  for (int32_t begin = 0; begin < n_cells; begin += fillers.n) {
    const int32_t number = begin + fillers.number;
    const bool live = number < n_cells;
    int32_t tiles = 0;
    int32_t n_filled = 0;
    int32_t before = 0;
    if (live) {
      if (begin > 0) cell = CellToFill(p, room, graph, number);
      tiles = graph.tokens[number];
      constexpr int kAtOnce = 4;  // Mostly, there are two.
#pragma unroll 1
      for (int32_t i = 0; i < cell.n_hosts; i += kAtOnce) {
        int32_t others[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          others[j] = i + j < cell.n_hosts ? graph.tokens[cell.first + i + j] : 0;
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          n_filled += others[j] > 0;
          before += others[j] > 0 && i + j < cell.nth;
        }
      }
    }
    if (begin > 0) Threads::Sync();
    if (!live) continue;
    const int32_t last = cell.first + cell.n_hosts - 1;
    const bool filled = tiles > 0;
    const int32_t all = cell.places;
    // Mostly one or two, and a division would take longer.
    const int32_t each = n_filled > 2 ? SmallDivisor(n_filled).Quotient(all) : all >> n_filled / 2;
    const int32_t share = each + (before < all - each * n_filled);
    const int32_t renumbered = filled ? cell.first + before : last;
    const uint32_t packed = cell.expert | static_cast<uint32_t>(renumbered) << 16;
    places.shared[cell.listed] = packed;
    places.of_slot[cell.at.slot] = packed;
    tiles_of_slot[cell.at.slot] = tiles;
    if (number == last && n_filled < cell.n_hosts) places.tokens[last] = 0;
    if (filled) {
      places.tokens[renumbered] = share;
      places.slot[renumbered] = cell.at.slot;
      atomicAdd(&places.load[cell.at.rank], share);
      atomicAdd(&places.loose[cell.at.rank], all - share);
      if (n_filled == 1) places.home[cell.expert] = cell.at.slot;
    } else {
      atomicAnd(&places.mask[cell.expert * kWords + (cell.at.rank >> 5)],
                ~(1u << (cell.at.rank & 31)));
    }
  }
#pragma unroll 1
  for (int32_t r = threadIdx.x; r < p.ep_size; r += Threads::Size()) {
    // Modulo 2³²: with the empty places it is in range.
    const uint32_t tokens = static_cast<uint32_t>(graph.load[r]) * rows;
    atomicAdd(reinterpret_cast<uint32_t*>(&places.load[r]), 0u - tokens);
  }
}

// What SolveTiles finds.
struct TileProof {
  Proof tiles;
  int32_t max_tokens;
  const uint32_t* rows;  // by cell, of its tiles, if the graph has their empty places; else null

  // The tokens of a cell with tiles, of which the graph has `tokens`.
  __device__ __forceinline__ int32_t TokensOf(int32_t tokens, int32_t cell) const {
    return rows == nullptr ? tokens : static_cast<int32_t>(rows[cell] - tokens);
  }
};

// Like SolveGraph, in tiles, and then in tokens, which TileProof::TokensOf tells from those of the
// graph's cells. Experts are then left with the cells that serve any; `tiles_of_slot` [n_physical]
// tells which do, and graph.tokens is elsewhere. `small_base`: whether those of BaseTiles that the
// thread asked for are. `memory`: PlacesWords.
template <int kWords, typename Threads, typename Totals>
__device__ inline TileProof SolveTiles(const Problem& p, const Totals& totals, const Costs& costs,
                                       bool small_base, GraphMemory& graph, int32_t* tiles_of_slot,
                                       int32_t* memory) {
  const TotalsIn<Unit::kTiles, Totals> tiles = {totals, costs};
  const TotalsIn<Unit::kEmptyPlaces, Totals> room = {totals, costs};
  const int32_t rows = costs.TileRows();
  GraphMemory places = graph;
  places.tokens = reinterpret_cast<int32_t*>(graph.place);  // Read before.
  places.load = memory;
  places.loose = memory + p.ep_size;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < PlacesWords(p); i += Threads::Size()) memory[i] = 0;
  const bool small = StartSplit<Threads>(p, tiles, graph, costs.by_tile.Quotient(p.safe_load / 2));
  int32_t status = 0;
  if (Threads::Any(!small || !small_base)) {
    status =
        LargeLoads<Threads>(p.ep_size, p.slots_per_rank, totals, graph.of_slot, BaseTokens{costs});
    if (status != 0) atomicOr(graph.status, status);
    status = Threads::Any(status & kLoadOverflow);
  }
  if (status != 0) {
    StayHome<kWords, Threads>(p.n_logical, totals, graph);
    return {{kInt32Max, 0}, kInt32Max, nullptr};
  }
  CellToFill cell;
  HeldRanks<kWords> held;
  const int32_t most = BalanceCells<kWords, Threads>(p, graph, held, [&] {
    if (rows > 1) PrepareRoom<kWords, Threads>(p, room, graph, places.load, cell);
  });
  if (rows == 1) return {{most, most}, most, nullptr};
  StartRoom<kWords, Threads>(p, room, rows, cell, graph, places, tiles_of_slot);
  Threads::Sync();
  auto* const rows_of_cell = reinterpret_cast<uint32_t*>(graph.tokens);
  graph.tokens = places.tokens;
  if (threadIdx.x < RankTeam<kWords>::Size(p)) {
    int32_t load[kWords];
    ValuesOfRanks<kWords>(p, places.load, 0, load);
#pragma unroll
    for (int w = 0; w < kWords; ++w) load[w] = -load[w];
    held.Renumber(p, places);
    const int32_t target = HandOut<kWords>(p, places, held, -FirstTarget(p, places, load));
    if (threadIdx.x == 0) *graph.target = -target;
    RankTeam<kWords>::SyncLast(RankTeam<kWords>::Size(p));
  }
  // Meanwhile, since dealing takes a step for each of an expert's cells.
  Aside<kWords, Threads>(p).ForEach(*graph.n_cells, [&](int32_t cell) {
    rows_of_cell[cell] = static_cast<uint32_t>(tiles_of_slot[places.slot[cell]]) * rows;
  });
  Threads::Sync();
  return {{most, most}, *graph.target, rows_of_cell};
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_TILES_CUH_
