// Solves any placement with one team of threads, as device functions that the kernels compose:
// PrefetchGraph; ClearGraph; BuildGraph; the totals and a barrier; SolveGraph.
#ifndef LPLB_CUDA_GRAPH_SOLVER_CUH_
#define LPLB_CUDA_GRAPH_SOLVER_CUH_

#include "cuda/graph_waves.cuh"

namespace lplb::cuda {

// Status bits of the loads of experts with slots, if not all are small; kLoadOverflow, too, where
// some rank could be given more than int32 holds if it served all tokens of its experts, besides
// those that `base`, if given, has of the rank. All threads of the team call it.
template <typename Threads, typename Totals, typename... Base>
__device__ __forceinline__ int32_t LargeLoads(int32_t ep_size, int32_t slots_per_rank,
                                              Totals totals, const uint32_t* of_slot,
                                              Base... base) {
  int32_t status = 0;
#pragma unroll 1
  for (int32_t r = threadIdx.x; r < ep_size; r += Threads::Size()) {
    int64_t most = (int64_t{0} + ... + base[r]);
#pragma unroll 1
    for (int32_t i = r * slots_per_rank; i < (r + 1) * slots_per_rank; ++i) {
      if (ExpertIn(of_slot[i]) == kNoExpert) continue;
      const int2 total = totals[ExpertIn(of_slot[i])];
      most += total.x;
      status |= total.y;
    }
    if (most > kInt32Max) status |= kLoadOverflow;
  }
  return status;
}

// Leaves the tokens of shared experts at home. Ends with a barrier.
template <int kWords, typename Threads, typename Totals>
__device__ __forceinline__ void StayHome(int32_t n_logical, Totals totals, GraphMemory graph) {
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < n_logical; e += Threads::Size()) {
    const int32_t n_hosts = HostsOf<kWords>(graph, e);
    if (n_hosts < 2) continue;
#pragma unroll 1
    for (int32_t cell = graph.first[e]; cell < graph.first[e] + n_hosts; ++cell) {
      graph.tokens[cell] = graph.slot[cell] == graph.home[e] ? totals[e].x : 0;
    }
  }
  Threads::Sync();
}

// The totals of one batch element, of which each thread fetches its first load at once.
class PrefetchedTotals {
 public:
  __device__ __forceinline__ PrefetchedTotals(const Problem& p, const int32_t* loads)
      : loads_(loads),
        first_(static_cast<int32_t>(threadIdx.x) < p.n_logical ? loads[threadIdx.x] : 0) {}

  // All threads of the block call it; a barrier must follow.
  __device__ __forceinline__ void Store(const Problem& p, const Sources& sources,
                                        int2* total) const {
    if (threadIdx.x < p.n_logical) {
      total[threadIdx.x] = SumSources(loads_, sources, threadIdx.x, first_);
    }
#pragma unroll 1
    for (int32_t e = threadIdx.x + blockDim.x; e < p.n_logical; e += blockDim.x) {
      total[e] = SumSources(loads_, sources, e);
    }
  }

 private:
  const int32_t* loads_;
  int32_t first_;
};

// Gives a slot its part of its expert's tokens: as many as every cell has, of which the first get
// one more, or its quota, if quotas are given; and adds them to its rank's load. A barrier must
// follow. Returns whether the expert's load is up to `safe_load`.
template <typename Totals>
__device__ __forceinline__ bool StartSlot(const BuiltSlot& slot, const Totals& totals,
                                          const int32_t* given, const GraphMemory& graph,
                                          int32_t safe_load) {
  const uint32_t expert = ExpertIn(slot.packed);
  if (expert == kNoExpert) return true;
  const int2 total = totals[expert];
  uint32_t share = total.x;
  if (CellIn(slot.packed) != kNoNumber) {
    const uint32_t n_hosts = slot.place >> 16;
    // Mostly two, and a division would take longer.
    const uint32_t each = n_hosts == 2 ? share / 2 : share / n_hosts;
    share = each + ((slot.place & 0xffff) < share - each * n_hosts);
    if (given != nullptr) share = given[slot.at.slot];
    graph.tokens[CellIn(slot.packed)] = share;
    atomicAdd(&graph.loose[slot.at.rank], static_cast<int32_t>(share));
  }
  atomicAdd(&graph.load[slot.at.rank], static_cast<int32_t>(share));
  return total.x <= safe_load && total.y == 0;
}

// Divides every expert's tokens over its cells evenly. As StartSlot, for all slots.
template <typename Threads, typename Totals>
__device__ __forceinline__ bool StartSplit(const Problem& p, const Totals& totals,
                                           const GraphMemory& graph, int32_t safe_load) {
  bool safe = true;
  ForSlots<Threads>(p, PlacedSlot(p, threadIdx.x), [&](const PlacedSlot& at, auto) {
    safe &= StartSlot(BuiltSlot(graph, at), totals, nullptr, graph, safe_load);
  });
  return safe;
}

// The bounds of the set of all ranks and of the sets of one; whole warps call it, each finds it.
template <int kWords>
__device__ __forceinline__ int32_t FirstTarget(const Problem& p, const GraphMemory& graph,
                                               const int32_t (&load)[kWords]) {
  int32_t loose[kWords];
  ValuesOfRanks<kWords>(p, graph.loose, 0, loose);
  int32_t fixed = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) fixed = max(fixed, load[w] - loose[w]);
  return max(WarpCeilMean(load, p.by_ranks), __reduce_max_sync(kFullWarp, fixed));
}

template <int kWords>
__device__ __forceinline__ int32_t FirstTarget(const Problem& p, const GraphMemory& graph) {
  int32_t load[kWords];
  ValuesOfRanks<kWords>(p, graph.load, 0, load);
  return FirstTarget(p, graph, load);
}

// Balances the ranks from the plan that StartSplit makes, behind a barrier; ends with one. Returns
// the largest load, which is proven. All threads call `meanwhile` before that barrier, those that
// run no waves at once. The others tell their ranks.
template <int kWords, typename Threads, typename Meanwhile>
__device__ __forceinline__ int32_t BalanceCells(const Problem& p, const GraphMemory& graph,
                                                HeldRanks<kWords>& held,
                                                const Meanwhile& meanwhile) {
  if (threadIdx.x < RankTeam<kWords>::Size(p)) {
    const int32_t first = FirstTarget<kWords>(p, graph);
    held = HeldRanks<kWords>(p, graph);
    const int32_t target = GraphWaves<kWords, false>(p, graph, held, first, RaiseToMean<kWords>{p});
    if (threadIdx.x == 0) *graph.target = target;
    RankTeam<kWords>::SyncLast(RankTeam<kWords>::Size(p));
  }
  meanwhile();
  Threads::Sync();
  return *graph.target;
}

template <int kWords, typename Threads>
__device__ __forceinline__ int32_t BalanceCells(const Problem& p, const GraphMemory& graph) {
  HeldRanks<kWords> held;
  return BalanceCells<kWords, Threads>(p, graph, held, [] {});
}

// Solves the graph for these totals: splits those of shared experts over their cells. `start` makes
// a feasible plan, as StartSplit does. Where loads are too large to be divided, nothing is proven,
// and all tokens stay at home. All threads of the team call it behind what `start` needs, and get
// the proof; it ends with a barrier.
template <int kWords, typename Threads, typename Totals, typename Start>
__device__ inline Proof SolveGraph(const Problem& p, const Totals& totals, const GraphMemory& graph,
                                   const Start& start) {
  const bool safe = start();
  if (Threads::Any(!safe)) {
    const int32_t status = LargeLoads<Threads>(p.ep_size, p.slots_per_rank, totals, graph.of_slot);
    if (status != 0) atomicOr(graph.status, status);
    if (Threads::Any(status & kLoadOverflow)) {
      StayHome<kWords, Threads>(p.n_logical, totals, graph);
      return {kInt32Max, 0};
    }
  }
  const int32_t target = BalanceCells<kWords, Threads>(p, graph);
  return {target, target};
}

// The tokens of a slot, after SolveGraph. Without branches, which would take longer than to look
// for both what it has as a cell and what its expert has.
template <typename Totals>
__device__ __forceinline__ int32_t QuotaOf(const Totals& totals, const GraphMemory& graph,
                                           int32_t slot) {
  const uint32_t packed = graph.of_slot[slot];
  const bool serves = ExpertIn(packed) != kNoExpert;
  const bool has_cell = CellIn(packed) != kNoNumber;
  const int32_t all = totals[serves ? ExpertIn(packed) : 0].x;
  const int32_t in_cell = graph.tokens[has_cell ? CellIn(packed) : 0];
  return !serves ? 0 : has_cell ? in_cell : all;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_GRAPH_SOLVER_CUH_
