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

  // Of what all lanes of the warp vote, what the rank's do.
  static __device__ __forceinline__ uint32_t OfRank(uint32_t votes) {
    const uint32_t all = (1u << kLanes) - 1;
    return votes >> (threadIdx.x & 31 & ~(kLanes - 1)) & all;
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
  uint32_t mask[kWords];  // the expert's ranks; none where there is no cell
  int32_t first[kWords];  // the expert's first cell on a rank of each word

  // The expert's cell on the rank of word w that is bit `low`.
  __device__ __forceinline__ int32_t CellOn(int w, uint32_t low) const {
    return first[w] + __popc(mask[w] & (low - 1));
  }
};

// The number of the only bit. Like counting bits, this runs at a quarter of the rate of additions.
__device__ __forceinline__ int32_t BitNumber(uint32_t bit) { return 31 - __clz(bit); }

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
      int32_t first = graph.first[ExpertIn(packed)];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        cell[h].first[w] = first;
        cell[h].mask[w] = graph.mask[ExpertIn(packed) * kWords + w];
        if (w + 1 < kWords) first += __popc(cell[h].mask[w]);
      }
    }
  }
};

// A rank and the first of its cells.
template <int kWords>
struct HeldRank {
  int32_t rank;
  int32_t n_cells;      // 0 beyond the last rank
  bool more;            // than the first, here or in the warp's other ranks
  RankSet<kWords> bit;  // the rank; none beyond the last
  Hand<kWords> first;

  HeldRank() = default;
  __device__ __forceinline__ HeldRank(const Problem& p, const GraphMemory& graph, int32_t rank_)
      : rank(rank_) {
    const int32_t n_words = GraphMemory::SlotWords(p);
    const uint32_t* is_shared = graph.is_shared + rank * n_words;
    n_cells = rank < p.ep_size ? __popc(is_shared[0]) : 0;
    if (n_words > 1 && rank < p.ep_size) {  // Mostly not more than two.
      n_cells += __popc(is_shared[1]);
#pragma unroll 1
      for (int32_t w = 2; w < n_words; ++w) n_cells += __popc(is_shared[w]);
    }
    more = __any_sync(kFullWarp, n_cells > Hand<kWords>::kTurn);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      bit.word[w] = rank < p.ep_size && rank >> 5 == w ? 1u << (rank & 31) : 0;
    }
    first = Hand<kWords>(p, graph, rank, n_cells, 0);
  }
};

// Those of a thread.
template <int kWords>
struct HeldRanks {
  static constexpr int kRanks = RankTeam<kWords>::kRanks;

  HeldRank<kWords> of[kRanks];

  HeldRanks() = default;
  __device__ __forceinline__ HeldRanks(const Problem& p, const GraphMemory& graph) {
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      of[j] = HeldRank<kWords>(p, graph, RankTeam<kWords>::Rank(j));
    }
  }

  // After the cells got other numbers, on as many ranks as before.
  __device__ __forceinline__ void Renumber(const Problem& p, const GraphMemory& graph) {
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      of[j].first = Hand<kWords>(p, graph, of[j].rank, of[j].n_cells, 0);
    }
  }
};

// A push is divided among so many ranks at most: more take longer than the phases they save.
constexpr int32_t kMaxSpread = 4;

// Leaves of `to`, which has more, the first kMaxSpread in the cyclic order of the ranks after
// `rank`, which is not among them.
template <int kWords>
__device__ __forceinline__ void LimitSpread(uint32_t (&to)[kWords], int32_t rank) {
  uint32_t kept[kWords] = {};
  const uint32_t later = ~0u << (rank & 31);
  int32_t left = kMaxSpread;
  // Words in turn from the rank's own, whose lower ranks come last.
#pragma unroll 1
  for (int32_t turn = 0; turn <= kWords && left > 0; ++turn) {
    const int32_t word = ((rank >> 5) + turn) & (kWords - 1);
    uint32_t bits = turn == 0 ? later : turn == kWords ? ~later : ~0u;
#pragma unroll
    for (int w = 0; w < kWords; ++w) bits &= w == word ? to[w] : ~0u;
#pragma unroll 1
    for (; bits != 0 && left > 0; bits &= bits - 1, --left) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) kept[w] |= w == word ? bits & -bits : 0;
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) to[w] = kept[w];
}

// The hosts that a cell sends to.
template <int kWords>
struct Hosts {
  uint32_t set[kWords];
  int32_t n;
  int32_t rank;  // the lowest
  int32_t cell;  // the expert's there

  Hosts() = default;
  // Those `below`, of a cell that is on rank `from`.
  __device__ __forceinline__ Hosts(const HeldCell<kWords>& held, const RankSet<kWords>& below,
                                   int32_t from) {
    uint32_t others = 0;
    uint32_t low = 0;
    rank = 0;
    cell = 0;
    uint32_t mask = 0;
#pragma unroll
    for (int w = kWords - 1; w >= 0; --w) {
      set[w] = held.mask[w] & below.word[w];
      const bool any = set[w] != 0;
      others |= any ? low | (set[w] & (set[w] - 1)) : 0;
      low = any ? set[w] & -set[w] : low;
      rank = any ? 32 * w : rank;
      mask = any ? held.mask[w] : mask;
      cell = any ? held.first[w] : cell;
    }
    rank += BitNumber(low);
    cell += __popc(mask & (low - 1));
    n = low != 0;
    if (others == 0) return;  // Mostly.
    n = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) n += __popc(set[w]);
    if (n <= kMaxSpread) return;
    LimitSpread<kWords>(set, from);
    n = kMaxSpread;
  }

  // Sends so many tokens there, in equal parts, of which the first get one more.
  __device__ __forceinline__ void Send(const GraphMemory& graph, const HeldCell<kWords>& held,
                                       int32_t amount) const {
    if (n == 1) {  // Mostly.
      atomicAdd(&graph.tokens[cell], amount);
      atomicAdd(&graph.load[rank], amount);
      return;
    }
    // A third is the upper half of a product, exact below 2³¹.
    const int32_t each = n == 3 ? __umulhi(amount, 0x55555556u) : amount >> (n >> 1);
    int32_t more = amount - each * n;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll 1
      for (uint32_t bits = set[w]; bits != 0; bits &= bits - 1, --more) {
        const uint32_t low = bits & -bits;
        const int32_t part = each + (more > 0);
        atomicAdd(&graph.tokens[held.CellOn(w, low)], part);
        atomicAdd(&graph.load[32 * w + BitNumber(low)], part);
      }
    }
  }
};

// The cells in a hand that send, since they have tokens and hosts `below`.
template <int kWords>
struct Senders {
  using Ranks = RankTeam<kWords>;
  static constexpr int kHand = Ranks::kHand;

  Hosts<kWords> to[kHand];
  int32_t tokens[kHand];  // in the cell; 0 if it does not send
  int32_t nth[kHand];     // which sender it is of those in the hands of all the rank's lanes
  int32_t n;              // in the hands of all the rank's lanes

  Senders() = default;
  // Cells that send receive nothing meanwhile, so their tokens are the rank's own.
  template <typename TokensOf>
  __device__ __forceinline__ Senders(const Hand<kWords>& hand, int32_t rank,
                                     const RankSet<kWords>& below, const TokensOf& tokens_of) {
    uint32_t sends = 0;  // a bit per lane, the hand's cells one after the other
#pragma unroll
    for (int h = 0; h < kHand; ++h) {
      to[h] = Hosts<kWords>(hand.cell[h], below, rank);
      tokens[h] = tokens_of(h, to[h].n > 0);
      if (to[h].n == 0) tokens[h] = 0;
      sends |= Ranks::OfRank(__ballot_sync(kFullWarp, tokens[h] > 0)) << h * Ranks::kLanes;
    }
    uint32_t earlier = 0;
#pragma unroll
    for (int h = 0; h < kHand; ++h) earlier |= ((1u << Ranks::Lane()) - 1) << h * Ranks::kLanes;
    n = __popc(sends);
    int32_t before = __popc(sends & earlier);
#pragma unroll
    for (int h = 0; h < kHand; ++h) {
      nth[h] = before;
      before += tokens[h] > 0;
    }
  }
};

// The excess of a rank in n equal parts: as many as the least power of two that gives every sender
// one, and the first ones two. Part i has ⌊(excess + n − 1 − i) / n⌋ tokens: as many as all parts
// have, and one more in the first of them.
struct Parts {
  int32_t n_senders;
  int32_t log;  // log₂ n

  Parts() = default;
  __device__ __forceinline__ explicit Parts(int32_t n_senders_) : n_senders(n_senders_) {
    log = 32 - __clz(max(n_senders - 1, 0));
  }

  __device__ __forceinline__ int32_t Of(int32_t sender, int32_t excess) const {
    const int32_t first = (1 << log) - 1 - sender;
    const int32_t second = first - n_senders;  // below 0 if the sender has no second part
    const auto part = [&](int32_t more) {
      return static_cast<int32_t>((static_cast<uint32_t>(excess) + more) >> log);
    };
    return part(first) + (second >= 0 ? part(second) : 0);
  }
};

// How a rank pushes to the ranks `below`, if there are any, in a phase.
template <int kWords>
struct Pusher {
  using Ranks = RankTeam<kWords>;
  static constexpr int kTurn = Hand<kWords>::kTurn;

  RankSet<kWords> below;
  Senders<kWords> first;
  Parts parts;

  Pusher() = default;
  // `tokens` are those of the rank's first cells.
  __device__ __forceinline__ Pusher(const Problem& p, const GraphMemory& graph,
                                    const HeldRank<kWords>& mine, const RankSet<kWords>& below_,
                                    const int32_t (&tokens)[Ranks::kHand])
      : below(below_),
        first(mine.first, mine.rank, below_, [&](int h, bool) { return tokens[h]; }) {
    int32_t n_senders = first.n;
    if (mine.more) {
      ForMore(p, graph, mine,
              [&](const Hand<kWords>&, const Senders<kWords>& senders) { n_senders += senders.n; });
    }
    parts = Parts(n_senders);
  }

  // If the rank `pushes`, it sends what it has above the target, as far as its cells have their
  // parts of it. Whole warps call it.
  __device__ __forceinline__ void Push(const Problem& p, const GraphMemory& graph,
                                       const HeldRank<kWords>& mine, bool pushes,
                                       int32_t target) const {
    const int32_t excess = pushes ? max(graph.load[mine.rank] - target, 0) : 0;
    if constexpr (Ranks::kLanes > 1) __syncwarp();  // All have read the load.
    Send(graph, mine.rank, mine.first, first, excess, 0);
    if (!mine.more || !__any_sync(kFullWarp, pushes)) return;
    int32_t before = first.n;
    ForMore(p, graph, mine, [&](const Hand<kWords>& hand, const Senders<kWords>& senders) {
      Send(graph, mine.rank, hand, senders, excess, before);
      before += senders.n;
    });
  }

 private:
  // For the hands after the first and their senders.
  template <typename Function>
  __device__ __forceinline__ void ForMore(const Problem& p, const GraphMemory& graph,
                                          const HeldRank<kWords>& mine,
                                          const Function& function) const {
#pragma unroll 1
    for (int32_t begin = kTurn; __any_sync(kFullWarp, begin < mine.n_cells); begin += kTurn) {
      const Hand<kWords> hand(p, graph, mine.rank, mine.n_cells, begin);
      // The address leads away from cells that may be receiving: a branch would take longer.
      function(hand, Senders<kWords>(hand, mine.rank, below, [&](int h, bool some) {
                 return graph.tokens[some ? hand.cell[h].number : p.n_physical];
               }));
    }
  }

  __device__ __forceinline__ void Send(const GraphMemory& graph, int32_t rank,
                                       const Hand<kWords>& hand, const Senders<kWords>& senders,
                                       int32_t excess, int32_t before) const {
#pragma unroll
    for (int h = 0; h < Ranks::kHand; ++h) {
      const int32_t amount = min(parts.Of(before + senders.nth[h], excess), senders.tokens[h]);
      if (amount <= 0) continue;
      graph.tokens[hand.cell[h].number] = senders.tokens[h] - amount;
      atomicAdd(&graph.load[rank], -amount);
      senders.to[h].Send(graph, hand.cell[h], amount);
    }
  }
};

// The ranks that a token could go to from this lane's cells. Tells the tokens of its first ones.
template <int kWords>
__device__ __forceinline__ RankSet<kWords> ReachOf(
    const Problem& p, const GraphMemory& graph, const HeldRank<kWords>& mine,
    int32_t (&first_tokens)[RankTeam<kWords>::kHand]) {
  constexpr int32_t kTurn = Hand<kWords>::kTurn;
  RankSet<kWords> reach = {};
  const auto add = [&](const HeldCell<kWords>& cell, int32_t tokens) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) reach.word[w] |= tokens > 0 ? cell.mask[w] : 0;
  };
#pragma unroll
  for (int h = 0; h < RankTeam<kWords>::kHand; ++h) {
    first_tokens[h] = graph.tokens[mine.first.cell[h].number];
    add(mine.first.cell[h], first_tokens[h]);
  }
#pragma unroll 1
  for (int32_t begin = kTurn; begin < mine.n_cells; begin += kTurn) {
    const Hand<kWords> hand(p, graph, mine.rank, mine.n_cells, begin);
#pragma unroll
    for (int h = 0; h < RankTeam<kWords>::kHand; ++h) {
      add(hand.cell[h], graph.tokens[hand.cell[h].number]);
    }
  }
  return reach;
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
__device__ __forceinline__ int32_t GraphWaves(const Problem& p, const GraphMemory& graph,
                                              const HeldRanks<kWords>& held, int32_t target,
                                              Raise&& raise) {
  using Ranks = RankTeam<kWords>;
  constexpr int kRanks = Ranks::kRanks;
  const int32_t n_threads = Ranks::Size(p);
  const HeldRank<kWords>(&mine)[kRanks] = held.of;
  int32_t rank[kRanks];
#pragma unroll
  for (int j = 0; j < kRanks; ++j) rank[j] = Ranks::Rank(j);
  while (true) {
    int32_t load[kWords];
    ValuesOfRanks<kWords>(p, graph.load, target, load);
    int32_t tokens[kRanks][Ranks::kHand];
    RankSet<kWords> reach[kRanks];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) reach[j] = ReachOf(p, graph, mine[j], tokens[j]);
    RankSet<kWords> waiting;
    RankSet<kWords> seen;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      waiting.word[w] = __ballot_sync(kFullWarp, load[w] > target);
      seen.word[w] = __ballot_sync(kFullWarp, load[w] < target);
    }
    if (!AnyOf(kHandOut ? seen : waiting)) return target;
    const RankSet<kWords> above = waiting;

    Search<kWords> search(p, graph, rank, reach);

    // Breadth first from the ranks below the target, until all above have a level or nothing new
    // has.
    int32_t level[kRanks];
    RankSet<kWords> below[kRanks] = {};  // the level that the rank pushes to
#pragma unroll
    for (int j = 0; j < kRanks; ++j) level[j] = 0;
    RankSet<kWords> frontier = seen;
    int32_t depth = 0;
    bool more = AnyOf(waiting);
    while (more) {
      const RankSet<kWords> last = frontier;
      frontier = search.From(last);
#pragma unroll
      for (int w = 0; w < kWords; ++w) frontier.word[w] &= ~seen.word[w];
      const bool any = AnyOf(frontier);
      depth += any;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        seen.word[w] |= frontier.word[w];
        waiting.word[w] &= ~frontier.word[w];
      }
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        uint32_t found = 0;
#pragma unroll
        for (int w = 0; w < kWords; ++w) found |= frontier.word[w] & mine[j].bit.word[w];
        if (found != 0) {
          level[j] = depth;
          below[j] = last;
        }
      }
      more = any & AnyOf(waiting);
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

    Pusher<kWords> pusher[kRanks];
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
      pusher[j] = Pusher<kWords>(p, graph, mine[j], below[j], tokens[j]);
    }
    // The deepest level first, every rank pushes what it has above the target one level down.
#pragma unroll 1
    for (int32_t l = depth; l > 0; --l) {
#pragma unroll
      for (int j = 0; j < kRanks; ++j) pusher[j].Push(p, graph, mine[j], level[j] == l, target);
      Ranks::Sync(n_threads);
    }
  }
}

template <int kWords, typename Raise>
__device__ inline int32_t GraphWaves(const Problem& p, const GraphMemory& graph, int32_t target,
                                     Raise&& raise) {
  return GraphWaves<kWords, false>(p, graph, HeldRanks<kWords>(p, graph), target, raise);
}

template <int kWords>
__device__ inline int32_t GraphWaves(const Problem& p, const GraphMemory& graph, int32_t target) {
  return GraphWaves<kWords>(p, graph, target, RaiseToMean<kWords>{p});
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
__device__ inline int32_t HandOut(const Problem& p, const GraphMemory& graph,
                                  const HeldRanks<kWords>& held, int32_t target) {
  return GraphWaves<kWords, true>(p, graph, held, target, LowerToMean<kWords>{});
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_WAVES_CUH_
