// The two ways to route tokens, as the kernels call them: AlongTopology, where an expert has a home
// and at most one copy, and Anywhere. Threads is the team that makes the routes.
#ifndef LPLB_CUDA_ROUTE_ROUTING_CUH_
#define LPLB_CUDA_ROUTE_ROUTING_CUH_

#include "cuda/graph_solver.cuh"
#include "cuda/route/pieces.cuh"
#include "cuda/route/plan.cuh"
#include "cuda/route/tokens.cuh"

namespace lplb::cuda {

template <int kWords, int kColumns>
struct AlongTopology {
  using Fetched = Prefetched;

  static constexpr int32_t kPlanThreads = cuda::kPlanThreads;
  static constexpr bool kChooses = false;

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ Fetched Prefetch(const RouteArguments& a,
                                                     const SolveOperands& in, int64_t,
                                                     const Tables& tables) {
    return cuda::Prefetch<kQuotas, Threads>(a, in, tables);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Store(const RouteArguments& a, const SolveOperands& in,
                                               int64_t, const Tables& tables, Fetched& fetched,
                                               const RouteMemory& memory) {
    StorePrefetched<kQuotas, Threads>(a, in, tables, fetched, memory);
  }

  template <typename Threads>
  static __device__ __forceinline__ void Receive(const RouteArguments& a, const SyncCall& call,
                                                 bool leader, const RouteMemory& memory) {
    ReceiveTotals<Threads>(a, call, leader, memory);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Make(const RouteArguments& a, const SolveOperands& in,
                                              int64_t element, const Fetched& fetched,
                                              const SyncCall&, bool leader,
                                              const RouteMemory& memory) {
    MakeRoutes<kWords, kColumns, kQuotas, Threads>(a, in, element, fetched.slot, leader, memory);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Summarize(const RouteArguments& a, int64_t element,
                                                   int32_t block, int32_t n_blocks,
                                                   const RouteMemory& memory) {
    WriteSummary<kQuotas, Threads>(a, element, block, n_blocks, memory);
  }

  // Where tokens go.
  template <int kAll>
  static __device__ __forceinline__ void LookUp(const RouteArguments&, const RouteMemory& memory,
                                                const NumberedToken (&token)[kAll],
                                                Place (&place)[kAll]) {
#pragma unroll
    for (int j = 0; j < kAll; ++j) {
      const PackedRoute route = memory.routes[max(token[j].expert, 0)];
      place[j] = PlaceBy(route, route.keep, token[j]);
    }
  }
};

template <int kWords>
struct Anywhere {
  using Fetched = PrefetchedGraph;

  // Few slots more than experts should not take another turn of all threads. With more than 64
  // ranks, a thread needs more registers, and there are more slots.
  static constexpr int32_t kPlanThreads = kWords <= 2 ? 384 : cuda::kPlanThreads;
  static constexpr bool kChooses = false;  // copies of the batch, between counts and routes

  static __device__ __forceinline__ GraphMemory GraphOf(const RouteArguments& a,
                                                        const RouteMemory& memory) {
    return GraphMemory(a.problem, kWords, memory.groups + a.problem.n_physical);
  }

  static __device__ __forceinline__ PieceTable PiecesOf(const RouteArguments& a,
                                                        const RouteMemory& memory) {
    return PieceTable(GraphOf(a, memory), memory.groups);
  }

  // What else a kernel needs comes here.
  static __device__ __forceinline__ int32_t* Behind(const Problem& p, const RouteMemory& memory) {
    return memory.groups + p.n_physical + GraphMemory::Words(p, kWords);
  }

  // The quotas, if they are not given, the tokens sent, and the graph follow one another.
  template <Quotas kQuotas, typename Threads, typename BaseLoad>
  static __device__ __forceinline__ void Clear(const RouteArguments& a, BaseLoad&& base,
                                               const RouteMemory& memory) {
    int32_t* const from = kQuotas == Quotas::kGiven ? PiecesOf(a, memory).sent : memory.quota;
    ClearGraph<Threads>(a.problem, base, from, GraphOf(a, memory));
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ Fetched Prefetch(const RouteArguments& a, const SolveOperands&,
                                                     int64_t, const Tables& tables) {
    return PrefetchGraph(a.problem, Threads::Size(), tables.phy2log, tables.log2phy);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Store(const RouteArguments& a, const SolveOperands&,
                                               int64_t element, const Tables& tables,
                                               Fetched& fetched, const RouteMemory& memory) {
    StoreGraph<kQuotas, Threads>(a, element, tables, fetched, NoBase(), memory);
  }

  // The graph, with ranks' loads besides their experts, and the quotas where they are given.
  template <Quotas kQuotas, typename Threads, typename BaseLoad>
  static __device__ __forceinline__ void StoreGraph(const RouteArguments& a, int64_t element,
                                                    const Tables& tables,
                                                    const PrefetchedGraph& fetched, BaseLoad&& base,
                                                    const RouteMemory& memory) {
    const GraphMemory graph = GraphOf(a, memory);
    Clear<kQuotas, Threads>(a, base, memory);
    if constexpr (kQuotas == Quotas::kGiven) {
      const int32_t* given = BatchElement(a.problem, a.sources, a.given, element).quota;
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < a.problem.n_physical; i += Threads::Size()) {
        memory.quota[i] = given[i];
      }
    }
    BuildGraph<kWords, Threads>(a.problem, tables.phy2log, tables.log2phy, fetched, graph);
    Threads::Sync();
  }

  template <typename Threads>
  static __device__ __forceinline__ void Receive(const RouteArguments& a, const SyncCall& call,
                                                 bool leader, const RouteMemory& memory) {
    const bool failed = AwaitTotals<Threads>(
        a, call, leader, memory, [](int32_t, int32_t, int32_t) {}, [](int32_t) {});
    if (failed && threadIdx.x == 0) *GraphOf(a, memory).status = kSyncFailed;
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Make(const RouteArguments& a, const SolveOperands&,
                                              int64_t element, const Fetched&, const SyncCall& call,
                                              bool leader, const RouteMemory& memory) {
    MakeFrom<kQuotas, Threads>(a, element, call, leader, memory, [&] {
      return StartSplit<Threads>(a.problem, CountedTotals{memory.total}, GraphOf(a, memory),
                                 a.problem.safe_load);
    });
  }

  // Where something is solved, from the plan that `start` makes, see SolveGraph.
  template <Quotas kQuotas, typename Threads, typename Start>
  static __device__ __forceinline__ void MakeFrom(const RouteArguments& a, int64_t element,
                                                  const SyncCall& call, bool leader,
                                                  const RouteMemory& memory, const Start& start) {
    const Problem& p = a.problem;
    const GraphMemory graph = GraphOf(a, memory);
    if constexpr (kQuotas != Quotas::kGiven) {
      const Proof proof = SolveGraph<kWords, Threads>(p, CountedTotals{memory.total}, graph, start);
      if (leader && threadIdx.x == 0) {
        const SolveResults out = BatchElement(p, a.solve_out, element);
        *out.max_load = proof.max_load;
        *out.lower_bound = proof.lower_bound;
      }
    }
    DealAll<kQuotas, Threads>(a, element, call, graph, memory,
                              [](int32_t tokens, int32_t) { return tokens; });
  }

  // Deals this source's tokens of all experts by memory.quota. Unless the quotas were given, they
  // come there first: to_quota(tokens of a cell in the graph, the cell).
  template <Quotas kQuotas, typename Threads, typename ToQuota>
  static __device__ __forceinline__ void DealAll(const RouteArguments& a, int64_t element,
                                                 const SyncCall& call, const GraphMemory& graph,
                                                 const RouteMemory& memory,
                                                 const ToQuota& to_quota) {
    const Problem& p = a.problem;
    const bool failed = kQuotas == Quotas::kSynced && (*graph.status & kSyncFailed);
    const PieceTable pieces = PiecesOf(a, memory);
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
      Dealer dealer(pieces, graph.first[e], memory.own[e]);
      const int32_t n_hosts = HostsOf<kWords>(graph, e);
      if constexpr (kQuotas == Quotas::kSolved) {
        StoreQuotas(memory, graph, e, n_hosts, to_quota,
                    [&](int32_t slot, int32_t tokens) { dealer.Add(slot, tokens); });
      } else {
        if constexpr (kQuotas == Quotas::kSynced) {
          StoreQuotas(memory, graph, e, n_hosts, to_quota, [](int32_t, int32_t) {});
        }
        if (n_hosts > 1 && !failed)
          Deal<kQuotas>(a, element, call, graph, memory, e, n_hosts, dealer);
      }
      memory.routes[e] = dealer.Finish(failed ? -1 : graph.home[e]);
    }
  }

  // The quotas of an expert's slots, all others are 0. The pieces may then have the cells' place;
  // `use(slot, quota)`, called for each host of a shared expert, may already let them.
  template <typename ToQuota, typename Use>
  static __device__ __forceinline__ void StoreQuotas(const RouteMemory& memory,
                                                     const GraphMemory& graph, int32_t e,
                                                     int32_t n_hosts, const ToQuota& to_quota,
                                                     const Use& use) {
    if (n_hosts == 1) memory.quota[graph.home[e]] = CountedTotals{memory.total}[e].x;
    if (n_hosts < 2) return;
    const int32_t first = graph.first[e];
#pragma unroll 1
    for (int32_t cell = first; cell < first + n_hosts; ++cell) {
      const int32_t slot = graph.slot[cell];
      const int32_t tokens = to_quota(graph.tokens[cell], cell);
      memory.quota[slot] = tokens;
      use(slot, tokens);
    }
  }

  // Deals this source's tokens of a shared expert.
  template <Quotas kQuotas>
  static __device__ __forceinline__ void Deal(const RouteArguments& a, int64_t element,
                                              const SyncCall& call, const GraphMemory& graph,
                                              const RouteMemory& memory, int32_t e, int32_t n_hosts,
                                              Dealer& dealer) {
    const Problem& p = a.problem;
    const int32_t first = graph.first[e];
    const auto deal_by_distance = [&](int32_t me, const auto& count_of) {
      DealByDistance(p, graph, memory.quota, first, n_hosts, me, count_of, dealer);
    };
    if constexpr (kQuotas == Quotas::kSynced) {
      deal_by_distance(a.peers.rank, [&](int32_t source) {
        return static_cast<int32_t>(LoadWord(a.peers.inbox + call.RowOf(a.peers, source) + e));
      });
      return;
    }
    if constexpr (kQuotas == Quotas::kGiven) {
      const AssignOperands given = BatchElement(p, a.sources, a.given, element);
      if (a.proportional) {
        DealShares(p, graph, memory.quota, first, n_hosts, max(given.counts[e], 0), *given.rank,
                   dealer);
        return;
      }
      if (a.sources.n_sources > 1) {
        const int32_t me = min(max(*given.rank, 0), p.ep_size - 1);  // An index, whatever it is.
        deal_by_distance(
            me, [&](int32_t source) { return max(given.counts[source * a.sources.row + e], 0); });
        return;
      }
    }
    ForHosts(graph, memory.quota, first, n_hosts,
             [&](int32_t slot, int32_t tokens) { dealer.Add(slot, tokens); });
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Summarize(const RouteArguments& a, int64_t element,
                                                   int32_t block, int32_t n_blocks,
                                                   const RouteMemory& memory) {
    const Problem& p = a.problem;
    const int32_t first = block * Threads::Size() + threadIdx.x;
    const int32_t stride = n_blocks * Threads::Size();
    const int32_t* sent = PiecesOf(a, memory).sent;
    int32_t* counts = a.tokens.slot_counts;
    if (counts != nullptr) counts += element * p.n_physical;
    const SolveResults out = BatchElement(p, a.solve_out, element);
    if (kQuotas != Quotas::kGiven && first == 0) {
      const int32_t invalid = memory.total[p.n_logical] != 0 ? kInvalidIndex : 0;
      *out.status = *GraphOf(a, memory).status | invalid;
    }
#pragma unroll 1
    for (int32_t i = first; i < p.n_physical; i += stride) {
      if constexpr (kQuotas != Quotas::kGiven) out.quota[i] = memory.quota[i];
      if (counts != nullptr) counts[i] = sent[i];
    }
  }

  // Where tokens go.
  template <int kAll>
  static __device__ __forceinline__ void LookUp(const RouteArguments& a, const RouteMemory& memory,
                                                const NumberedToken (&token)[kAll],
                                                Place (&place)[kAll]) {
    const PieceTable pieces = PiecesOf(a, memory);
    PieceSearch search[kAll];
    int32_t n = 0;
#pragma unroll
    for (int j = 0; j < kAll; ++j) {
      const PackedRoute route = memory.routes[max(token[j].expert, 0)];
      search[j].Begin(pieces, route, token[j], place[j]);
      n |= search[j].n;
    }
    if (n != 0) FindPieces(pieces, search, token, place);
  }
};

// Calls `function` with the routing of a problem that is solved, as a value of its type.
template <typename Function>
auto WithRouting(const Problem& p, Function&& function) {
  if (p.node_size > 0) {
    return WithGraphWords(p,
                          [&](auto words) { return function(Anywhere<decltype(words)::value>()); });
  }
  return WithSolverShape(p, [&](auto shape) {
    return function(AlongTopology<decltype(shape)::kWords, decltype(shape)::kColumns>());
  });
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_ROUTING_CUH_
