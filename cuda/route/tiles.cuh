// Routing by the tiles that slots cost, on any placement, as the kernels call it.
#ifndef LPLB_CUDA_ROUTE_TILES_CUH_
#define LPLB_CUDA_ROUTE_TILES_CUH_

#include "cuda/graph_tiles.cuh"
#include "cuda/route/routing.cuh"

namespace lplb::cuda {

template <int kWords>
struct OverTiles : Anywhere<kWords> {
  using Base = Anywhere<kWords>;

  struct Fetched {
    PrefetchedGraph graph;
    BaseTiles base;
  };

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ Fetched Prefetch(const RouteArguments& a,
                                                     const SolveOperands& in, int64_t element,
                                                     const Tables& tables) {
    return {Base::template Prefetch<kQuotas, Threads>(a, in, element, tables),
            BaseTiles(a.problem, BatchElement(a.problem, a.costs, element))};
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Store(const RouteArguments& a, const SolveOperands&,
                                               int64_t element, const Tables& tables,
                                               Fetched& fetched, const RouteMemory& memory) {
    Base::template StoreGraph<kQuotas, Threads>(a, element, tables, fetched.graph, fetched.base,
                                                memory);
    const int32_t status = fetched.base.status();
    if (status != 0) atomicOr(Base::GraphOf(a, memory).status, status);
  }

  template <Quotas kQuotas, typename Threads>
  static __device__ __forceinline__ void Make(const RouteArguments& a, const SolveOperands&,
                                              int64_t element, const Fetched& fetched,
                                              const SyncCall& call, bool leader,
                                              const RouteMemory& memory) {
    const Problem& p = a.problem;
    const Costs costs = BatchElement(p, a.costs, element);
    const CountedTotals totals = {memory.total};
    GraphMemory graph = Base::GraphOf(a, memory);
    const TileProof proof = SolveTiles<kWords, Threads>(
        p, totals, costs, fetched.base.small(), graph, memory.quota, Base::Behind(p, memory));
    if (leader && threadIdx.x == 0) {
      const SolveResults out = BatchElement(p, a.solve_out, element);
      *out.max_load = proof.tiles.max_load;
      *out.lower_bound = proof.tiles.lower_bound;
      *costs.max_tokens = proof.max_tokens;
    }
    Base::template DealAll<kQuotas, Threads>(
        a, element, call, graph, memory,
        [&](int32_t tokens, int32_t cell) { return proof.TokensOf(tokens, cell); });
  }
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_TILES_CUH_
