// The waves of the exact solver on any placement: lplb_jax/reference/graph.py says what they do.
// They are phases of a maximum flow on the graph of the ranks: an arc leads from a rank to every
// host of every expert that has tokens there.
#ifndef LPLB_CUDA_GRAPH_WAVES_CUH_
#define LPLB_CUDA_GRAPH_WAVES_CUH_

#include "cuda/replica_graph.cuh"
#include "cuda/waves.cuh"

namespace lplb::cuda {

// The threads that run the waves, the first of their block: kLanes a rank, which take its cells,
// and, one after the other, kRanks ranks.
template <int words>
struct RankTeam {
  static constexpr int kWords = words;
  static constexpr int kLanes = words == 1 ? 8 : words == 2 ? 4 : words == 4 ? 2 : 1;
  static constexpr int kRanks = words == 16 ? 2 : 1;
  static constexpr int kHand = words == 1 || words == 16 ? 1 : 2;  // cells of a lane at a time
  static constexpr int kMaxThreads = 256;

  // Whole warps.
  static __device__ __forceinline__ int32_t Size(const Problem& p) {
    return min((p.ep_size * kLanes + 31) & ~31, kMaxThreads);
  }
  // Thread's j-th rank; it may be beyond the last.
  static __device__ __forceinline__ int32_t Rank(int32_t j) {
    return (threadIdx.x + j * kMaxThreads) / kLanes;
  }
  static __device__ __forceinline__ int32_t Lane() { return threadIdx.x % kLanes; }

  static __device__ __forceinline__ void Sync(int32_t size) {
    asm volatile("bar.sync 5, %0;" ::"r"(size) : "memory");
  }
  // Before a barrier of more threads, behind what these have written since their last one. Orders
  // nothing more, but without it, compute-sanitizer's racecheck reports it. It takes 0.02 µs.
  static __device__ __forceinline__ void SyncLast(int32_t size) { Sync(size); }

  // The bits of all the rank's lanes.
  static __device__ __forceinline__ uint32_t Or(uint32_t bits) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) bits |= __shfl_xor_sync(kFullWarp, bits, step);
    return bits;
  }

  // Inclusive sum over the rank's lanes.
  static __device__ __forceinline__ int32_t Scan(int32_t value) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const int32_t lower = __shfl_up_sync(kFullWarp, value, step, kLanes);
      if (Lane() >= step) value += lower;
    }
    return value;
  }

  static __device__ __forceinline__ int32_t OfLastLane(int32_t value) {
    return kLanes == 1 ? value : __shfl_sync(kFullWarp, value, kLanes - 1, kLanes);
  }
};

template <int kWords>
__device__ __forceinline__ bool AnyOf(const RankSet<kWords>& set) {
  uint32_t any = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) any |= set.word[w];
  return any != 0;
}

// One value per rank, read by every warp: lane l gets those of ranks l, 32 + l, … and, beyond the
// last, `other`.
template <int kWords>
__device__ __forceinline__ void ValuesOfRanks(const Problem& p, const int32_t* values,
                                              int32_t other, int32_t (&value)[kWords]) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + static_cast<int32_t>(threadIdx.x & 31);
    value[w] = rank < p.ep_size ? values[rank] : other;
  }
}

// A cell, as the lane that takes it sees it.
template <int kWords>
struct HeldCell {
  int32_t number;         // p.n_physical where there is none: what is there, nobody writes
  int32_t first;          // the expert's first cell
  uint32_t mask[kWords];  // the expert's ranks; none where there is no cell
};

__device__ __forceinline__ int32_t LowestBit(uint32_t bits) { return __ffs(bits) - 1; }
__device__ __forceinline__ int32_t LowestBit(uint64_t bits) { return __ffsll(bits) - 1; }

// Some of a rank's cells, as one of its lanes sees them: kHand in a row.
template <int kWords>
struct Hand {
  static constexpr int kHand = RankTeam<kWords>::kHand;
  static constexpr int kTurn = RankTeam<kWords>::kLanes * kHand;  // cells of all lanes

  HeldCell<kWords> cell[kHand];

  Hand() = default;
  // From the rank's cell number `begin` on.
  __device__ __forceinline__ Hand(const Problem& p, const GraphMemory& graph, int32_t rank,
                                  int32_t n_cells, int32_t begin) {
#pragma unroll
    for (int h = 0; h < kHand; ++h) {
      cell[h] = {p.n_physical};
      const int32_t i = begin + RankTeam<kWords>::Lane() * kHand + h;
      if (i >= n_cells) continue;
      const uint32_t packed = graph.shared[rank * p.slots_per_rank + i];
      cell[h].number = CellIn(packed);
      cell[h].first = graph.first[ExpertIn(packed)];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        cell[h].mask[w] = graph.mask[ExpertIn(packed) * kWords + w];
      }
    }
  }
};

// A rank and the first of its cells.
template <int kWords>
struct HeldRank {
  int32_t rank;
  int32_t n_cells;  // 0 beyond the last rank
  Hand<kWords> first;

  HeldRank() = default;
  __device__ __forceinline__ HeldRank(const Problem& p, const GraphMemory& graph, int32_t rank_)
      : rank(rank_) {
    n_cells = 0;
    const int32_t n_words = rank < p.ep_size ? GraphMemory::SlotWords(p) : 0;
#pragma unroll 1
    for (int32_t w = 0; w < n_words; ++w) {
      n_cells += __popc(graph.is_shared[rank * n_words + w]);
    }
    first = Hand<kWords>(p, graph, rank, n_cells, 0);
  }
};

// Moves `amount` tokens of a cell of `rank` to hosts of its expert, in equal parts: to the next n
// of `to` in the cyclic order of the ranks, which has so many, 0 < n ≤ 4.
template <int kWords>
__device__ __forceinline__ void Spread(const GraphMemory& graph, const HeldCell<kWords>& cell,
                                       const uint32_t (&to)[kWords], int32_t n, int32_t rank,
                                       int32_t amount) {
  // A third is the upper half of a product, exact below 2³¹.
  const int32_t each = n == 3 ? __umulhi(amount, 0x55555556u) : amount >> (n >> 1);
  const int32_t more = amount - each * n;
  const auto send = [&](int32_t target, int32_t place, int32_t part) {
    atomicAdd(&graph.tokens[cell.first + place], part);
    atomicAdd(&graph.load[target], part);
  };
  if (n == 1) {  // Mostly.
    int32_t target = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) target = to[w] != 0 ? 32 * w + __ffs(to[w]) - 1 : target;
    send(target, PlaceOf<kWords>(cell.mask, target), amount);
    return;
  }
  if constexpr (kWords <= 2) {
    using Bits = std::conditional_t<kWords == 1, uint32_t, uint64_t>;
    const auto joined = [](const uint32_t (&word)[kWords]) {
      Bits bits = word[0];
      if constexpr (kWords == 2) bits |= static_cast<Bits>(word[1]) << 32;
      return bits;
    };
    constexpr int32_t kLast = 32 * kWords - 1;
    const Bits ranks = joined(to);
    // Turned so that the rank after this one is the lowest bit.
    const int32_t turn = (rank + 1) & kLast;
    Bits bits = ranks >> turn | ranks << ((kLast + 1 - turn) & kLast);
#pragma unroll 1
    for (int32_t i = 0; i < n; ++i, bits &= bits - 1) {
      const int32_t target = (LowestBit(bits) + turn) & kLast;
      send(target, PlaceOf<kWords>(cell.mask, target), each + (i < more));
    }
  } else {
    // Words with a target, in turn from the rank's own, whose lower ranks come last.
    const uint32_t later = ~0u << (rank & 31);  // `rank` itself is not in `to`.
    int32_t word = rank >> 5;
    int32_t i = 0;
    bool start = true;
#pragma unroll 1
    while (i < n) {
      uint32_t bits = 0;
      uint32_t mask = 0;
      int32_t place = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        bits = w == word ? to[w] : bits;
        mask = w == word ? cell.mask[w] : mask;
        place += w < word ? __popc(cell.mask[w]) : 0;
      }
      if (word == rank >> 5) bits &= start ? later : ~later;
      start = false;
#pragma unroll 1
      for (; bits != 0 && i < n; ++i, bits &= bits - 1) {
        const uint32_t lowest = bits & -bits;
        send(32 * word + __popc(lowest - 1), place + __popc(mask & (lowest - 1)),
             each + (i < more));
      }
      word = (word + 1) & (kWords - 1);
    }
  }
}

// A rank, if it `pushes`, sends what it has above the target to the ranks `below`: its cells in
// their order, which its lanes take side by side.
template <int kWords>
__device__ __forceinline__ void Push(const Problem& p, const GraphMemory& graph,
                                     const HeldRank<kWords>& mine, bool pushes,
                                     const RankSet<kWords>& below, int32_t target) {
  using Ranks = RankTeam<kWords>;
  constexpr int kHand = Ranks::kHand;
  int32_t excess = pushes ? max(graph.load[mine.rank] - target, 0) : 0;
  Hand<kWords> hand = mine.first;
#pragma unroll 1
  for (int32_t begin = 0;;) {
    uint32_t to[kHand][kWords];
    int32_t n[kHand];
    int32_t here[kHand];
    int32_t movable = 0;
#pragma unroll
    for (int h = 0; h < kHand; ++h) {
      // Not of a rank that may be receiving. As an address, since a branch would take longer.
      here[h] = graph.tokens[pushes ? hand.cell[h].number : p.n_physical];
      n[h] = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        to[h][w] = hand.cell[h].mask[w] & below.word[w];
        n[h] += __popc(to[h][w]);
      }
      if (n[h] == 0) here[h] = 0;
      movable += here[h];
    }
    if (!__any_sync(kFullWarp, excess > 0 && begin < mine.n_cells)) return;
    const int32_t sum = Ranks::Scan(movable);
    int32_t left = excess - (sum - movable);
    if constexpr (Ranks::kLanes > 1) __syncwarp();  // All have read the load.
#pragma unroll
    for (int h = 0; h < kHand; ++h) {
      const int32_t amount = min(left, here[h]);
      left -= amount;
      if (amount <= 0) continue;
      // Only the level below receives meanwhile: this cell and this load are the rank's own.
      graph.tokens[hand.cell[h].number] = here[h] - amount;
      Spread<kWords>(graph, hand.cell[h], to[h], min(n[h], 4), mine.rank, amount);
    }
    if (excess > 0 && Ranks::Lane() == Ranks::kLanes - 1) {
      graph.load[mine.rank] = target + max(excess - sum, 0);
    }
    begin += Hand<kWords>::kTurn;
    if (!__any_sync(kFullWarp, excess > 0 && begin < mine.n_cells)) return;
    excess = max(excess - Ranks::OfLastLane(sum), 0);
    hand = Hand<kWords>(p, graph, mine.rank, mine.n_cells, begin);
  }
}

// The ranks that a token could go to from this lane's cells.
template <int kWords>
__device__ __forceinline__ RankSet<kWords> ReachOf(const Problem& p, const GraphMemory& graph,
                                                   const HeldRank<kWords>& mine) {
  RankSet<kWords> reach = {};
  Hand<kWords> hand = mine.first;
#pragma unroll 1
  for (int32_t begin = Hand<kWords>::kTurn;; begin += Hand<kWords>::kTurn) {
#pragma unroll
    for (int h = 0; h < Hand<kWords>::kHand; ++h) {
      const bool some = graph.tokens[hand.cell[h].number] > 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) reach.word[w] |= some ? hand.cell[h].mask[w] : 0;
    }
    if (begin >= mine.n_cells) return reach;
    hand = Hand<kWords>(p, graph, mine.rank, mine.n_cells, begin);
  }
}

// Breadth first search: the ranks that a set can be reached from. Every rank gives the ranks that
// it reaches itself. Up to 128 ranks each warp has them all in registers and searches by itself:
// lane l has those of ranks l, 32 + l, …
template <int kWords>
struct Search {
  uint32_t row[kWords][kWords];

  __device__ __forceinline__ Search(const Problem& p, const GraphMemory& graph,
                                    const int32_t (&rank)[1], const RankSet<kWords> (&reach)[1]) {
    using Ranks = RankTeam<kWords>;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t word = Ranks::Or(reach[0].word[w]);
      if (Ranks::Lane() == 0 && rank[0] < p.ep_size) graph.search[w * p.ep_size + rank[0]] = word;
    }
    Ranks::Sync(Ranks::Size(p));
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const int32_t r = 32 * w + static_cast<int32_t>(threadIdx.x & 31);
#pragma unroll
      for (int v = 0; v < kWords; ++v) {
        row[w][v] = r < p.ep_size ? graph.search[v * p.ep_size + r] : 0;
      }
    }
  }

  // The ranks that reach a rank of `to`.
  __device__ __forceinline__ RankSet<kWords> From(const RankSet<kWords>& to) {
    RankSet<kWords> from;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t both = 0;
#pragma unroll
      for (int v = 0; v < kWords; ++v) both |= row[w][v] & to.word[v];
      from.word[w] = __ballot_sync(kFullWarp, both != 0);
    }
    return from;
  }
};

// Beyond, a thread has its own ranks, and the warps tell one another.
template <>
struct Search<16> {
  using Ranks = RankTeam<16>;

  const Problem& p;
  int32_t* hits;  // Two rounds' in turn, since nobody waits after reading.
  int32_t* next_hits;
  const int32_t (&rank)[Ranks::kRanks];
  const RankSet<16> (&reach)[Ranks::kRanks];

  __device__ __forceinline__ Search(const Problem& p_, const GraphMemory& graph,
                                    const int32_t (&rank_)[Ranks::kRanks],
                                    const RankSet<16> (&reach_)[Ranks::kRanks])
      : p(p_),
        hits(reinterpret_cast<int32_t*>(graph.search)),
        next_hits(hits + p_.ep_size),
        rank(rank_),
        reach(reach_) {}

  __device__ __forceinline__ RankSet<16> From(const RankSet<16>& to) {
#pragma unroll
    for (int j = 0; j < Ranks::kRanks; ++j) {
      uint32_t both = 0;
#pragma unroll
      for (int w = 0; w < 16; ++w) both |= reach[j].word[w] & to.word[w];
      if (rank[j] < p.ep_size) hits[rank[j]] = both != 0;
    }
    Ranks::Sync(Ranks::Size(p));
    RankSet<16> from;
#pragma unroll
    for (int w = 0; w < 16; ++w) {
      const int32_t r = 32 * w + static_cast<int32_t>(threadIdx.x & 31);
      from.word[w] = __ballot_sync(kFullWarp, r < p.ep_size && hits[r] != 0);
    }
    int32_t* const last_hits = hits;
    hits = next_hits;
    next_hits = last_hits;
    return from;
  }
};

// The target, raised to the mean load of the ranks that were not seen.
template <int kWords>
struct RaiseToMean {
  const Problem& p;

  __device__ __forceinline__ int32_t operator()(int32_t (&load)[kWords],
                                                const RankSet<kWords>& seen, int32_t target) const {
    int32_t n_seen = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      load[w] = seen.word[w] >> (threadIdx.x & 31) & 1 ? 0 : load[w] - target;
      n_seen += __popc(seen.word[w]);
    }
    return target + WarpCeilMean(load, SmallDivisor(p.ep_size - n_seen));
  }
};

// Balances the loads of the ranks, which must be what the cells' tokens make of them; `target` is
// proven. Returns the target, raised to what is proven, which no load is above then. The threads of
// RankTeam call it behind a barrier; another must follow. `raise` gives the target where nothing
// can leave the ranks that were not seen; it may change what loads are counted from.
//
// With kHandOut, what moves are empty places, of which every rank shall have the target at least:
// the waves end when no load is below it, and `raise` lowers it where no rank above it is among
// those seen.
template <int kWords, bool kHandOut, typename Raise>
__device__ inline int32_t GraphWaves(const Problem& p, const GraphMemory& graph, int32_t target,
                                     Raise&& raise) {
  using Ranks = RankTeam<kWords>;
  constexpr int kRanks = Ranks::kRanks;
  const int32_t n_threads = Ranks::Size(p);
  int32_t rank[kRanks];
  HeldRank<kWords> mine[kRanks];
#pragma unroll
  for (int j = 0; j < kRanks; ++j) {
    rank[j] = Ranks::Rank(j);
    mine[j] = HeldRank<kWords>(p, graph, rank[j]);
  }
  while (true) {
    int32_t load[kWords];
    ValuesOfRanks<kWords>(p, graph.load, target, load);
    RankSet<kWords> waiting;
    RankSet<kWords> seen;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      waiting.word[w] = __ballot_sync(kFullWarp, load[w] > target);
      seen.word[w] = __ballot_sync(kFullWarp, load[w] < target);
    }
    if (!AnyOf(kHandOut ? seen : waiting)) return target;
    const RankSet<kWords> above = waiting;

    RankSet<kWords> reach[kRanks];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) reach[j] = ReachOf(p, graph, mine[j]);
    Search<kWords> search(p, graph, rank, reach);

    // Breadth first from the ranks below the target, until all above have a level or nothing new
    // has.
    int32_t level[kRanks];
    RankSet<kWords> below[kRanks] = {};  // the level that the rank pushes to
#pragma unroll
    for (int j = 0; j < kRanks; ++j) level[j] = 0;
    RankSet<kWords> frontier = seen;
    int32_t depth = 0;
    while (AnyOf(waiting)) {
      const RankSet<kWords> last = frontier;
      frontier = search.From(last);
#pragma unroll
      for (int w = 0; w < kWords; ++w) frontier.word[w] &= ~seen.word[w];
      if (!AnyOf(frontier)) break;
      ++depth;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        seen.word[w] |= frontier.word[w];
        waiting.word[w] &= ~frontier.word[w];
      }
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (mine[j].n_cells > 0 && frontier.Has(mine[j].rank)) {
          level[j] = depth;
          below[j] = last;
        }
      }
    }

    bool stuck = AnyOf(waiting);
    if constexpr (kHandOut) {
      RankSet<kWords> giving;
#pragma unroll
      for (int w = 0; w < kWords; ++w) giving.word[w] = above.word[w] & seen.word[w];
      stuck = !AnyOf(giving);
    }
    if (stuck) {
      target = raise(load, seen, target);
      Ranks::Sync(n_threads);  // All have read the rows.
      continue;
    }

    // The deepest level first, every rank pushes what it has above the target one level down.
#pragma unroll 1
    for (int32_t l = depth; l > 0; --l) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        Push<kWords>(p, graph, mine[j], level[j] == l, below[j], target);
      }
      Ranks::Sync(n_threads);
    }
  }
}

template <int kWords, typename Raise>
__device__ inline int32_t GraphWaves(const Problem& p, const GraphMemory& graph, int32_t target,
                                     Raise&& raise) {
  return GraphWaves<kWords, false>(p, graph, target, raise);
}

template <int kWords>
__device__ inline int32_t GraphWaves(const Problem& p, const GraphMemory& graph, int32_t target) {
  return GraphWaves<kWords, false>(p, graph, target, RaiseToMean<kWords>{p});
}

// The target, lowered to the mean of the ranks that were seen.
template <int kWords>
struct LowerToMean {
  __device__ __forceinline__ int32_t operator()(int32_t (&load)[kWords],
                                                const RankSet<kWords>& seen, int32_t target) const {
    int32_t n_seen = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      load[w] = seen.word[w] >> (threadIdx.x & 31) & 1 ? target - load[w] : 0;
      n_seen += __popc(seen.word[w]);
    }
    return target - WarpCeilMean(load, SmallDivisor(n_seen));
  }
};

// Hands out empty places, which are the cells' tokens here; load is what ranks have of them,
// counted from one number for each. Returns the target reached. Else as GraphWaves.
template <int kWords>
__device__ inline int32_t HandOut(const Problem& p, const GraphMemory& graph, int32_t target) {
  return GraphWaves<kWords, true>(p, graph, target, LowerToMean<kWords>{});
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_WAVES_CUH_
