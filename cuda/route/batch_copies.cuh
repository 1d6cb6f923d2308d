// Routing over copies that are chosen for the batch at hand, as the kernels call it: the copies
// come between the counts and the routes over them. Blocks of a cluster share the attempts; by
// itself, a block makes them all.
#ifndef LPLB_CUDA_ROUTE_BATCH_COPIES_CUH_
#define LPLB_CUDA_ROUTE_BATCH_COPIES_CUH_

#include <cooperative_groups.h>

#include <type_traits>

#include "cuda/batch_copies.cuh"
#include "cuda/cluster.cuh"
#include "cuda/route/routing.cuh"

namespace lplb::cuda {

// What choosing takes besides the tables of any placement, behind them.
struct ChoiceMemory {
  uint4* results;      // [kNTargets], .x: copies of every attempt of the cluster
  uint64_t* arrivals;  // [2], count the bytes of the results, and of the copies that were chosen
  int32_t* words;      // CopiesMemory, and behind it the copies that come with the results

  __device__ explicit ChoiceMemory(int32_t* memory) {
    const uint32_t address = SharedAddress(memory);
    results = static_cast<uint4*>(__cvta_shared_to_generic((address + 15) / 16 * 16));
    arrivals = reinterpret_cast<uint64_t*>(results + kNTargets);
    words = reinterpret_cast<int32_t*>(arrivals + 2);
  }

  // Of the blocks of a cluster; 0 for a block by itself.
  __device__ __forceinline__ AttemptResults Shared(const Problem& p, int32_t n_blocks) const {
    int32_t* behind = words + CopiesMemory::Words(p, RouteMemory::Attempts(n_blocks));
    return {results, reinterpret_cast<uint4*>(behind), RouteMemory::EarlyChunks(p, n_blocks),
            &arrivals[0]};
  }
};

// One end of a copy that was chosen: its own slot or its expert's home.
struct CopyEnd {
  int32_t expert;
  int32_t tokens;  // that come there: at home, minus those that moved
  PlacedSlot at;

  CopyEnd() = default;
  __device__ __forceinline__ CopyEnd(const Problem& p, const CopiesMemory& memory, uint2 copy,
                                     bool is_home)
      : expert(memory.ExpertOf(copy)),
        tokens(is_home ? -memory.TokensOf(copy) : memory.TokensOf(copy)),
        at(p, is_home ? memory.HomeOf(copy) : memory.SlotOf(copy)) {}
};

// The copies that were chosen.
struct ChosenCopies {
  CopiesMemory memory;  // of the attempt
  int32_t n;
  bool too_many;  // tokens to choose any
};

template <int kWords>
struct OverBatchCopies : Anywhere<kWords> {
  using Base = Anywhere<kWords>;
  using Fetched = PrefetchedGraph;

  // Attempts take few warps, and more would slow those down.
  static constexpr int32_t kPlanThreads = cuda::kPlanThreads;
  static constexpr bool kChooses = true;

  // By one thread, before its block announces that it has started.
  static __device__ __forceinline__ void Begin(const RouteArguments& a, int32_t n_blocks,
                                               const RouteMemory& memory) {
    const ChoiceMemory choice(Base::Behind(a.problem, memory));
    InitArrivals(&choice.arrivals[0]);
    InitArrivals(&choice.arrivals[1]);
    ExpectBytes(&choice.arrivals[0], choice.Shared(a.problem, n_blocks).Bytes());
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Store(const RouteArguments& a, const SolveOperands&,
                                               int64_t, const Tables& tables, Fetched& fetched,
                                               const RouteMemory& memory) {
    const Problem& p = a.problem;
    const GraphMemory graph = Base::GraphOf(a, memory);
    Base::template Clear<kQuotas, Threads>(a, NoBase(), memory);
    const CopiesMemory copies(p, 0, ChoiceMemory(Base::Behind(p, memory)).words);
    FindHomes<Threads>(p, tables.phy2log, tables.log2phy, fetched, copies);
    Threads::Sync();  // It may empty what others read next, if the tables contradict themselves.
    // The graph of the homes.
    bool bad = false;
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
      const int32_t home = copies.home[e];
      const bool is_home = home >= 0 && home < p.n_physical && copies.expert[home] == e;
      const int32_t rank = is_home ? p.by_slots.Quotient(home) : 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        graph.mask[e * kWords + w] = is_home && rank >> 5 == w ? 1u << (rank & 31) : 0;
      }
      graph.home[e] = is_home ? home : -1;
      bad |= !is_home;
    }
    if (bad) atomicOr(graph.status, kBadPlacement);
  }

  // The copies, then in this block's memory.
  template <typename Threads>
  static __device__ __forceinline__ ChosenCopies Choose(const RouteArguments& a,
                                                        const AttemptShape& shape, int32_t block,
                                                        const ChoiceMemory& choice) {
    const Problem& p = a.problem;
    const int32_t lane = threadIdx.x & 31;
    const int32_t warp = threadIdx.x / 32;
    const CopiesMemory memory(p, 0, choice.words);
    const Targets targets = TargetsOf<kWords>(p, memory);
    const AttemptResults shared = choice.Shared(p, shape.n_blocks > 1 ? shape.n_blocks : 0);
    const BestAttempt best = MakeAttempts<kWords, Threads>(p, choice.words, shape, block, targets,
                                                           a.copies.fan_out, shared);
    CopiesMemory won(p, shape.WarpOf(best.nth), choice.words);
    const bool here = shared.HasAllOf(best);
    if (here) won.chosen = reinterpret_cast<uint2*>(shared.copies + best.nth * shared.n_chunks);
    const ChosenCopies copies = {won, best.n_copies, targets.too_many};
    if (here || shape.n_blocks == 1) return copies;
    const int32_t owner = shape.BlockOf(best.nth);
    // Nobody makes an attempt any more: the block that has the copies sends them to all others.
    const int32_t n_chunks = (best.n_copies + 1) / 2;
    if (owner != block) {
      if (threadIdx.x == 0) {
        ExpectBytes(&choice.arrivals[1], n_chunks * static_cast<int32_t>(sizeof(uint4)));
      }
      AwaitBytes(&choice.arrivals[1]);
      return copies;
    }
    auto* chosen = reinterpret_cast<uint4*>(won.chosen);
#pragma unroll 1
    for (int32_t to = warp; to < shape.n_blocks; to += Threads::Size() / 32) {
      if (to == block) continue;
#pragma unroll 1
      for (int32_t i = lane; i < n_chunks; i += 32) {
        SendTo(to, chosen + i, chosen[i], &choice.arrivals[1]);
      }
    }
    return copies;
  }

  // Adds the copies to the graph of the homes, with the tokens that moved: a plan to start from.
  // Their experts come into copies.memory.expert. A barrier must follow.
  //
  // One half of the threads takes the copies themselves, and the other half their homes, side by
  // side. Of an expert's copies, one leads: its home's thread finds cells for all of them.
  template <typename Threads>
  static __device__ __forceinline__ void AddCopies(const Problem& p, const ChosenCopies& copies,
                                                   const int32_t* total, const GraphMemory& graph) {
    const CopiesMemory& memory = copies.memory;
    const int32_t slot_words = GraphMemory::SlotWords(p);
    const int32_t thread = threadIdx.x;
    const int32_t n_threads = Threads::Size();
    const int32_t half = n_threads / 2;
    const bool is_home = thread >= half;
    const int32_t first = is_home ? thread - half : thread;
    uint32_t* const leader = graph.of_slot;  // by home; not needed else
    // Each thread keeps its first end, often the only one.
    CopyEnd mine = {};
    if (first < copies.n) mine = CopyEnd(p, memory, memory.chosen[first], is_home);
    const auto for_ends = [&](const auto& use) {
#pragma unroll 1
      for (int32_t i = first; i < copies.n; i += half) {
        use(i, i == first ? mine : CopyEnd(p, memory, memory.chosen[i], is_home));
      }
    };
    // By other warps than the copies, if there are few.
#pragma unroll 1
    for (int32_t r = n_threads - 1 - thread; r < p.ep_size; r += n_threads) {
      atomicAdd(&graph.load[r], memory.load[r]);
    }
    for_ends([&](int32_t i, const CopyEnd& end) {
      if (is_home) {
        atomicExch(&leader[end.at.slot], i);
      } else {
        memory.expert[end.at.slot] = end.expert;
        atomicOr(&graph.mask[end.expert * kWords + (end.at.rank >> 5)], 1u << (end.at.rank & 31));
      }
      atomicOr(&graph.is_shared[end.at.rank * slot_words + (end.at.k >> 5)], 1u << (end.at.k & 31));
      atomicAdd(&graph.load[end.at.rank], end.tokens);
      atomicAdd(&graph.loose[end.at.rank], end.tokens);
    });
    Threads::Sync();
    const auto place_of = [&](const CopyEnd& end) {
      return PlaceOf<kWords>(graph.mask + end.expert * kWords, end.at.rank);
    };
    const auto nth_of = [&](const CopyEnd& end) {
      return NthShared(graph.is_shared + end.at.rank * slot_words, end.at.k);
    };
    const auto put = [&](const CopyEnd& end, int32_t nth, int32_t cell, int32_t tokens) {
      graph.slot[cell] = end.at.slot;
      graph.tokens[cell] = tokens;
      graph.shared[end.at.rank * p.slots_per_rank + nth] = end.expert | static_cast<uint32_t>(cell)
                                                                            << 16;
    };
    int32_t my_place = 0;
    int32_t my_nth = 0;
    for_ends([&](int32_t i, const CopyEnd& end) {
      const int32_t place = place_of(end);
      const int32_t nth = nth_of(end);
      if (i == first) my_place = place;
      if (i == first) my_nth = nth;
      if (!is_home || leader[end.at.slot] != static_cast<uint32_t>(i)) return;
      const int32_t all = total[end.expert];
      const int32_t cell = FetchAdd(graph.n_cells, HostsOf<kWords>(graph, end.expert));
      graph.first[end.expert] = cell;
      put(end, nth, cell + place, all);
      atomicAdd(&graph.loose[end.at.rank], all);
    });
    Threads::Sync();
    for_ends([&](int32_t i, const CopyEnd& end) {
      const int32_t cell = graph.first[end.expert] + (i == first ? my_place : place_of(end));
      if (is_home) {
        atomicAdd(&graph.tokens[cell], end.tokens);
      } else {
        put(end, i == first ? my_nth : nth_of(end), cell, end.tokens);
      }
    });
  }

  // Where there are too many tokens to choose copies, the graph has homes only.
  template <typename Threads>
  static __device__ __forceinline__ bool StartAtHome(const Problem& p, const int32_t* expert,
                                                     const int32_t* total,
                                                     const GraphMemory& graph) {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
      graph.of_slot[i] = expert[i] >= 0 ? expert[i] | kNoNumber << 16 : kNoExpert;
    }
    Threads::Sync();
    return StartSplit<Threads>(p, CountedTotals{total}, graph, p.safe_load);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Make(const RouteArguments& a, const SolveOperands&,
                                              int64_t element, const Fetched&, const SyncCall& call,
                                              bool leader, const RouteMemory& memory) {
    const Problem& p = a.problem;
    const ChoiceMemory choice(Base::Behind(p, memory));
    const CopiesMemory copies(p, 0, choice.words);
    AttemptShape shape = {1, RouteMemory::Attempts(0)};
    int32_t block = 0;
    if constexpr (!std::is_same_v<Threads, Block>) {
#if __CUDA_ARCH__ >= 900
      shape = {a.cluster, RouteMemory::Attempts(a.cluster)};
      block = cooperative_groups::this_cluster().block_rank();
#endif
    }
    // −1 for a total that passes int32 is more than that as an unsigned number, too.
    LoadHomes<Threads>(
        p, [&](int32_t e) { return static_cast<uint32_t>(memory.total[e]); }, copies);
    const ChosenCopies chosen = Choose<Threads>(a, shape, block, choice);
    const GraphMemory graph = Base::GraphOf(a, memory);
    Base::template MakeFrom<kQuotas, Threads>(a, element, call, leader, memory, [&] {
      if (chosen.too_many) return StartAtHome<Threads>(p, copies.expert, memory.total, graph);
      AddCopies<Threads>(p, chosen, memory.total, graph);
      return true;
    });
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Summarize(const RouteArguments& a, int64_t element,
                                                   int32_t block, int32_t n_blocks,
                                                   const RouteMemory& memory) {
    Base::template Summarize<kQuotas, Threads>(a, element, block, n_blocks, memory);
    const Problem& p = a.problem;
    const GraphMemory graph = Base::GraphOf(a, memory);
    const CopiesMemory copies(p, 0, ChoiceMemory(Base::Behind(p, memory)).words);
    const int32_t width = a.copies.width;
    int32_t* phy2log = a.copies.out.phy2log + element * p.n_physical;
    int32_t* log2phy = a.copies.out.log2phy + element * (p.n_logical * width);
    int32_t* logcnt = a.copies.out.logcnt + element * p.n_logical;
    const int32_t first = block * Threads::Size() + threadIdx.x;
    const int32_t stride = n_blocks * Threads::Size();
#pragma unroll 1
    for (int32_t i = first; i < p.n_physical; i += stride) phy2log[i] = copies.expert[i];
    // A warp writes a row: the home, then the copies in the order of their ranks.
    const int32_t lane = threadIdx.x & 31;
#pragma unroll 1
    for (int32_t e = first / 32; e < p.n_logical; e += stride / 32) {
      const int32_t n_hosts = HostsOf<kWords>(graph, e);
      const int32_t home = n_hosts > 0 ? graph.home[e] : -1;
      const int32_t before =
          n_hosts > 1 ? PlaceOf<kWords>(graph.mask + e * kWords, p.by_slots.Quotient(home)) : 0;
      if (lane == 0) logcnt[e] = n_hosts;
#pragma unroll 1
      for (int32_t k = lane; k < width; k += 32) {
        int32_t slot = -1;
        if (k == 0) slot = home;
        if (k > 0 && k < n_hosts) slot = graph.slot[graph.first[e] + (k <= before ? k - 1 : k)];
        log2phy[e * width + k] = slot;
      }
    }
  }
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_BATCH_COPIES_CUH_
