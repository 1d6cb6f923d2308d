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
  int32_t* words;      // CopiesMemory

  __device__ ChoiceMemory(const Problem& p, const RouteMemory& memory) {
    const int32_t words_before = GraphMemory::Words(p) + p.n_physical;
    const uint32_t address = SharedAddress(memory.groups + words_before);
    results = static_cast<uint4*>(__cvta_shared_to_generic((address + 15) / 16 * 16));
    arrivals = reinterpret_cast<uint64_t*>(results + kNTargets);
    words = reinterpret_cast<int32_t*>(arrivals + 2);
  }
};

template <int kWords>
struct OverBatchCopies : Anywhere<kWords> {
  using Base = Anywhere<kWords>;
  using Fetched = PrefetchedGraph;

  static constexpr bool kChooses = true;

  // By one thread, before its block announces that it has started.
  static __device__ __forceinline__ void Begin(const RouteArguments& a, const RouteMemory& memory) {
    const ChoiceMemory choice(a.problem, memory);
    InitArrivals(&choice.arrivals[0]);
    InitArrivals(&choice.arrivals[1]);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Store(const RouteArguments& a, const SolveOperands&,
                                               int64_t, const Tables& tables, Fetched& fetched,
                                               const RouteMemory& memory) {
    const Problem& p = a.problem;
    const PieceTable pieces = Base::PiecesOf(a, memory);
    if (threadIdx.x == 0) *Base::GraphOf(a, memory).status = 0;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
      pieces.sent[i] = memory.quota[i] = 0;
    }
    const CopiesMemory copies(p, 0, ChoiceMemory(p, memory).words);
    FindHomes<Threads>(p, tables.phy2log, tables.log2phy, fetched, copies);
  }

  // The number of the best attempt, whose copies are then in this block's memory, at the place of
  // its warp. Ends with a barrier.
  template <typename Threads>
  static __device__ __forceinline__ int32_t Choose(const RouteArguments& a,
                                                   const AttemptShape& shape, int32_t block,
                                                   const ChoiceMemory& choice) {
    const Problem& p = a.problem;
    const int32_t lane = threadIdx.x & 31;
    const int32_t warp = threadIdx.x / 32;
    const CopiesMemory memory(p, 0, choice.words);
    const TargetRange targets = TargetsOf<kWords>(p, memory);
    const bool together = shape.n_blocks > 1;
    MakeAttempts<kWords>(p, choice.words, shape, block, targets, a.copies.fan_out,
                         [&](int32_t nth, int32_t n_copies) {
                           const uint4 result = {static_cast<uint32_t>(n_copies), 0, 0, 0};
                           if (!together) {
                             if (lane == 0) choice.results[nth] = result;
                           } else if (lane < shape.n_blocks) {
                             SendTo(lane, &choice.results[nth], result, &choice.arrivals[0]);
                           }
                         });
    if (together) {
      if (threadIdx.x == 0) ExpectBytes(&choice.arrivals[0], kNTargets * sizeof(uint4));
      AwaitBytes(&choice.arrivals[0]);
    } else {
      Threads::Sync();
    }
    const int32_t best = ChooseAttempt(static_cast<int32_t>(choice.results[lane].x), targets);
    const CopiesMemory won(p, shape.WarpOf(best), choice.words);
    if (shape.BlockOf(best) == block && shape.IsOverwritten(best)) {
      if (warp == shape.WarpOf(best)) {
        Attempt<kWords>(p, won, targets.Target(best), a.copies.fan_out);
      }
      Threads::Sync();
    }
    if (!together) return best;
    // Nobody makes an attempt any more: the block that has the copies sends them to all others.
    const int32_t n_chunks = CopiesMemory::TakenWords(p) / 4;
    uint4* taken = reinterpret_cast<uint4*>(won.n_taken);
    if (shape.BlockOf(best) != block) {
      if (threadIdx.x == 0) ExpectBytes(&choice.arrivals[1], n_chunks * sizeof(uint4));
      AwaitBytes(&choice.arrivals[1]);
      return best;
    }
    Threads::Sync();  // The copies are those of a warp.
#pragma unroll 1
    for (int32_t to = warp; to < shape.n_blocks; to += Threads::Size() / 32) {
      if (to == block) continue;
#pragma unroll 1
      for (int32_t i = lane; i < n_chunks; i += 32) {
        SendTo(to, taken + i, taken[i], &choice.arrivals[1]);
      }
    }
    return best;
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Make(const RouteArguments& a, const SolveOperands& in,
                                              int64_t element, const Fetched&, const SyncCall& call,
                                              bool leader, const RouteMemory& memory) {
    const Problem& p = a.problem;
    const ChoiceMemory choice(p, memory);
    const CopiesMemory copies(p, 0, choice.words);
    AttemptShape shape = {1, RouteMemory::Attempts(0)};
    int32_t block = 0;
    if constexpr (!std::is_same_v<Threads, Block>) {
#if __CUDA_ARCH__ >= 900
      const auto cluster = cooperative_groups::this_cluster();
      const int32_t n_blocks = cluster.num_blocks();
      shape = {n_blocks, RouteMemory::Attempts(n_blocks)};
      block = cluster.block_rank();
#endif
    }
    // −1 for a total that passes int32 is more than that as an unsigned number, too.
    LoadHomes<Threads>(
        p, [&](int32_t e) { return static_cast<uint32_t>(memory.total[e]); }, copies);
    const int32_t best = Choose<Threads>(a, shape, block, choice);
    const CopiesMemory won(p, shape.WarpOf(best), choice.words);
    int32_t* phy2log = copies.tokens;  // Which nobody needs any more.
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
      phy2log[i] = ChosenIn(p, won, i);
    }
    Threads::Sync();
    Problem chosen = p;
    chosen.max_replicas = 1;  // Only homes are read.
    const PrefetchedGraph fetched = PrefetchGraph(chosen, Threads::Size(), phy2log, copies.home);
    BuildGraph<kWords, Threads>(chosen, phy2log, copies.home, fetched, Base::GraphOf(a, memory));
    Base::template Make<kQuotas, Threads>(a, in, element, fetched, call, leader, memory);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Summarize(const RouteArguments& a, int64_t element,
                                                   int32_t block, int32_t n_blocks,
                                                   const RouteMemory& memory) {
    Base::template Summarize<kQuotas, Threads>(a, element, block, n_blocks, memory);
    const Problem& p = a.problem;
    const GraphMemory graph = Base::GraphOf(a, memory);
    const CopiesMemory copies(p, 0, ChoiceMemory(p, memory).words);
    const int32_t width = a.copies.width;
    int32_t* phy2log = a.copies.out.phy2log + element * p.n_physical;
    int32_t* log2phy = a.copies.out.log2phy + element * (p.n_logical * width);
    int32_t* logcnt = a.copies.out.logcnt + element * p.n_logical;
    const int32_t first = block * Threads::Size() + threadIdx.x;
    const int32_t stride = n_blocks * Threads::Size();
#pragma unroll 1
    for (int32_t i = first; i < p.n_physical; i += stride) phy2log[i] = copies.tokens[i];
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
