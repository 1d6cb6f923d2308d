// The kernel of the interior point on any placement: one block solves one group, all ranks. Each
// number of ranks has a file of its own, hosts_<number>.cu, that compiles it.
#ifndef LPLB_CUDA_IPM_HOST_KERNEL_CUH_
#define LPLB_CUDA_IPM_HOST_KERNEL_CUH_

#include <algorithm>
#include <type_traits>

#include "cuda/graph_solver.cuh"
#include "cuda/ipm/host_iteration.cuh"
#include "cuda/ipm/kernel.cuh"

namespace lplb::cuda {

// What the block needs in shared memory besides the interior point's own.
struct HostMemory {
  HostArrays arrays;
  int32_t* own;   // [n_logical], loads as given, words
  float* weight;  // [ep_size]
  uint32_t* cut;  // [words of a set of ranks], the ranks of the best cut
  GraphMemory graph;

  static __host__ __device__ int64_t Bytes(const Problem& p) {
    return 4 * (6 * static_cast<int64_t>(p.n_logical) + 5 * static_cast<int64_t>(p.n_physical) +
                2 * p.ep_size + GraphWords(p.ep_size) + GraphMemory::Words(p));
  }

  __device__ HostMemory(const Problem& p, int32_t n_words, char* memory)
      : own(reinterpret_cast<int32_t*>(memory)),
        weight(reinterpret_cast<float*>(own + p.n_logical)),
        cut(reinterpret_cast<uint32_t*>(weight + p.ep_size)),
        graph(p, n_words,
              reinterpret_cast<int32_t*>(cut) + n_words + p.ep_size +
                  5 * (p.n_logical + p.n_physical)) {
    arrays.cut = reinterpret_cast<int32_t*>(cut + n_words);
    arrays.main = arrays.cut + p.ep_size;
    arrays.divided = arrays.main + p.n_logical;
    float* next = reinterpret_cast<float*>(arrays.divided + p.n_logical);
    for (float** of_expert : {&arrays.total, &arrays.least, &arrays.inverse_h}) {
      *of_expert = next;
      next += p.n_logical;
    }
    for (float** of_cell : {&arrays.x, &arrays.z, &arrays.h, &arrays.lack, &arrays.flow}) {
      *of_cell = next;
      next += p.n_physical;
    }
    // Shares become tokens in their places.
    arrays.share = reinterpret_cast<float*>(graph.tokens);
  }
};

// An expert's load from all sources, and status bits.
template <typename Load>
__device__ __forceinline__ int2 TotalOf(const int32_t* loads, const Sources& sources,
                                        int32_t expert) {
  if constexpr (std::is_same_v<Load, float>) {
    const RealTotal total = SumRealSources(reinterpret_cast<const float*>(loads), sources, expert);
    return {__float_as_int(total.load), total.negative ? kNegativeLoad : 0};
  } else {
    return SumSources(loads, sources, expert);
  }
}

// Words as totals of experts.
struct OwnTotals {
  const int32_t* own;

  __device__ __forceinline__ int2 operator[](int32_t expert) const { return {own[expert], 0}; }
};

// The whole group, of loads of type Load, as one block sees it.
template <typename Solver, typename Load>
struct HostBlock {
  static constexpr bool kFloats = std::is_same_v<Load, float>;
  static constexpr int kWords = Solver::kWords;

  const Problem& p;
  const Sources& sources;
  const IpmOptions& options;
  const IpmOperands& in;
  const HostMemory& memory;
  typename Solver::Memory& solver;
  Shared& shared;
  Load* quota;

  __device__ __forceinline__ Load Own(int32_t expert) const {
    return reinterpret_cast<const Load*>(memory.own)[expert];
  }

  // The graph, the weights and the loads of all experts. Ends with a barrier.
  __device__ __forceinline__ void LoadGroup() const {
    const PrefetchedGraph fetched =
        PrefetchGraph(p, blockDim.x, in.solve.phy2log, in.solve.log2phy);
    const GraphMemory& graph = memory.graph;
    if (threadIdx.x == 0) {
      shared.most = shared.max_load = shared.target = 0;
      shared.bound = 0;
    }
    for (int32_t r = threadIdx.x; r < Solver::kMostRanks; r += blockDim.x) {
      solver.ranks.base[r] = solver.ranks.w[r] = solver.ranks.y[r] = solver.ranks.q[r] = 0;
      solver.ranks.ex[r] = 1;
    }
    ClearGraph<Block>(p, NoBase(), graph.mask, graph);
    BuildGraph<kWords, Block>(p, in.solve.phy2log, in.solve.log2phy, fetched, graph);
    Block::Sync();
    if (threadIdx.x < 32) {
      LoadWeights(p.ep_size, options, in.weights, memory.weight, solver.ranks.w, graph.status);
      CheckInvalid<Load>(p, sources, in.solve.loads, graph.status);
    }
    int32_t status = 0;
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
      // Loads of experts without a slot reach no rank, and only make the placement a wrong one.
      const bool somewhere = HostsOf<kWords>(graph, e) > 0;
      const int2 total = somewhere ? TotalOf<Load>(in.solve.loads, sources, e) : int2{0, 0};
      memory.own[e] = total.x;
      memory.arrays.total[e] = static_cast<float>(Own(e));
      if (kFloats) atomicMax(&shared.most, total.x);
      status |= total.y;
    }
    if (status & kNegativeLoad) atomicOr(graph.status, kNegativeLoad);
    if (status & kLoadOverflow) atomicOr(graph.status, kLoadOverflow);
    __syncthreads();
  }

  // What cannot leave the ranks, and whether some rank could be given too much, which every thread
  // gets. A barrier.
  __device__ __forceinline__ bool Bound() const {
    const GraphMemory& graph = memory.graph;
    bool overflow = *graph.status & kLoadOverflow;
    if (threadIdx.x < p.ep_size) {
      std::conditional_t<kFloats, float, int64_t> most = 0;
      Load fixed = 0;
#pragma unroll 1
      for (int32_t i = threadIdx.x * p.slots_per_rank; i < (threadIdx.x + 1) * p.slots_per_rank;
           ++i) {
        const uint32_t packed = graph.of_slot[i];
        if (ExpertIn(packed) == kNoExpert) continue;
        most += Own(ExpertIn(packed));
        // An expert's share of an overflow may be anything.
        if (CellIn(packed) == kNoNumber) fixed += Own(ExpertIn(packed));
      }
      if constexpr (kFloats) {
        overflow |= !(fmaxf(most, most / memory.weight[threadIdx.x]) <= kMostLoad);
      } else {
        overflow |= most > kInt32Max;
        graph.load[threadIdx.x] = fixed;
      }
      solver.ranks.base[threadIdx.x] = static_cast<float>(fixed);
    }
    return __syncthreads_or(overflow);
  }

  // The interior point's shares and cut. Ends with a barrier.
  __device__ __forceinline__ void Solve() const {
    if constexpr (kFloats) {
      // A power of two first, since the sum of all experts' loads could overflow.
      const float power = PowerOfTwo(-Exponent(__int_as_float(shared.most)));
      if (threadIdx.x < p.ep_size) solver.ranks.base[threadIdx.x] *= power;
#pragma unroll 1
      for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
        memory.arrays.total[e] *= power;
      }
      __syncthreads();
    }
    if (threadIdx.x < Solver::kThreads) Solver(p, memory.graph, solver, memory.arrays).Run();
    __syncthreads();
    if (threadIdx.x < 32) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int32_t r = 32 * w + static_cast<int32_t>(threadIdx.x);
        const uint32_t word = __ballot_sync(kFullWarp, r < p.ep_size && memory.arrays.cut[r] != 0);
        if (threadIdx.x == 0) memory.cut[w] = word;
      }
    }
    __syncthreads();
  }

  // Whether the expert cannot leave the cut; those without a host have no load.
  __device__ __forceinline__ bool Confined(int32_t expert) const {
    uint32_t leaves = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      leaves |= memory.graph.mask[expert * kWords + w] & ~memory.cut[w];
    }
    return leaves == 0;
  }

  // Nothing is divided and nothing proven. Ends with a barrier.
  __device__ __forceinline__ void GiveUp() const {
    StayHome<kWords, Block>(p.n_logical, OwnTotals{memory.own}, memory.graph);
    WriteQuotas();
    if (threadIdx.x == 0) NoProof<kFloats>(options, shared);
    __syncthreads();
  }

  // By what the cells of shared experts have, words as the loads. Ends with a barrier.
  __device__ __forceinline__ void WriteQuotas() const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.n_physical; i += blockDim.x) {
      reinterpret_cast<int32_t*>(quota)[i] = QuotaOf(OwnTotals{memory.own}, memory.graph, i);
    }
    __syncthreads();
  }

  // Real loads: quotas, the plan's largest load / weight, and what the cut proves, in units of a
  // power of two that are never rounded up. Ends with a barrier.
  __device__ __forceinline__ void FinishReal() const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.n_physical; i += blockDim.x) {
      const uint32_t packed = memory.graph.of_slot[i];
      if (ExpertIn(packed) == kNoExpert || CellIn(packed) == kNoNumber) continue;
      float& share = memory.arrays.share[CellIn(packed)];
      share = share * Own(ExpertIn(packed));
    }
    __syncthreads();
    WriteQuotas();
    const int32_t warp = threadIdx.x / 32;
    const int32_t lane = threadIdx.x & 31;
#pragma unroll 1
    for (int32_t r = warp; r < p.ep_size; r += blockDim.x / 32) {
      float load = 0;
      for (int32_t k = lane; k < p.slots_per_rank; k += 32) load += quota[r * p.slots_per_rank + k];
      load = WarpSum(load);
      if (lane == 0) atomicMax(&shared.max_load, __float_as_int(load / memory.weight[r]));
    }
    if (warp == 0) {
      float most = 0;
#pragma unroll 1
      for (int32_t e = lane; e < p.n_logical; e += 32) most = fmaxf(most, Confined(e) ? Own(e) : 0);
      const int32_t exponent = 28 - Exponent(Team<32>::WarpMax(most));
      int64_t units = 0;
#pragma unroll 1
      for (int32_t e = lane; e < p.n_logical; e += 32) {
        if (Confined(e)) units += static_cast<int32_t>(ldexpf(Own(e), exponent));
      }
      units = WarpSum(units);
      float weight = 0;
      for (int32_t r = lane; r < p.ep_size; r += 32) {
        weight += memory.arrays.cut[r] ? memory.weight[r] : 0;
      }
      weight = WarpSum(weight);
      if (lane == 0) {
        const float proven = Provable(static_cast<float>(units), weight, p.ep_size);
        shared.bound = ldexpf(proven, -exponent);
      }
    }
    __syncthreads();
  }

  // Whole tokens of all cells by their shares: an expert's hosts up to each together have what they
  // should, rounded. A barrier must follow.
  __device__ __forceinline__ void DealTokens() const {
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
      const int32_t n_hosts = HostsOf<kWords>(memory.graph, e);
      if (n_hosts <= 1) continue;
      const int32_t total = memory.own[e];
      int32_t* tokens = memory.graph.tokens + memory.graph.first[e];
      float share = 0;
      int32_t given = 0;
#pragma unroll 1
      for (int32_t k = 0; k < n_hosts; ++k) {
        share += __int_as_float(tokens[k]);
        const int32_t rounded =
            max(given, RoundTokens(__fmul_rn(share, static_cast<float>(total)), total));
        const int32_t upto = k + 1 == n_hosts ? total : rounded;
        tokens[k] = upto - given;
        given = upto;
      }
    }
  }

  // Tokens: rounds the plan, proves a bound, and repairs. Ends with a barrier.
  __device__ __forceinline__ void FinishTokens() const {
    const GraphMemory& graph = memory.graph;
    const int32_t rank = threadIdx.x;
    DealTokens();
    __syncthreads();
    if (rank < p.ep_size) {
      int32_t loose = 0;
      const int32_t n_cells = CellsOf(p, graph, rank);
#pragma unroll 1
      for (int32_t k = 0; k < n_cells; ++k) {
        loose += graph.tokens[CellIn(graph.shared[rank * p.slots_per_rank + k])];
      }
      graph.loose[rank] = loose;
      graph.load[rank] += loose;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      int64_t kept = 0;
      int32_t size = 0;
#pragma unroll 1
      for (int32_t e = threadIdx.x; e < p.n_logical; e += 32)
        kept += Confined(e) ? memory.own[e] : 0;
      kept = WarpSum(kept);
#pragma unroll
      for (int w = 0; w < kWords; ++w) size += __popc(memory.cut[w]);
      if (options.weighted) {
        const float value = LeastValue(p.ep_size, memory.weight, kept,
                                       [&](int32_t r) { return memory.arrays.cut[r] != 0; });
        if (threadIdx.x == 0) shared.bound = value;
      } else {
        const int32_t target = FirstTarget<kWords>(p, graph);
        const int32_t proven = size > 0 ? CeilDivide(kept, SmallDivisor(size)) : 0;
        if (threadIdx.x == 0) shared.target = max(target, proven);
      }
    }
    __syncthreads();
    if (options.repair && threadIdx.x < RankTeam<kWords>::Size(p)) {
      Repair();
      RankTeam<kWords>::SyncLast(RankTeam<kWords>::Size(p));
    }
    __syncthreads();
    int32_t load = rank < p.ep_size ? graph.load[rank] : 0;
    if (options.weighted && rank < p.ep_size) {
      load = __float_as_int(static_cast<float>(load) / memory.weight[rank]);
    }
    NoteLargest(p.ep_size, load, &shared.max_load);
    WriteQuotas();
  }

  // Waves end at the optimum; by the threads of RankTeam. On ranks of different speeds loads are
  // counted from what the proven load / weight allows every rank, and the target is 0.
  __device__ __forceinline__ void Repair() const {
    using Ranks = RankTeam<kWords>;
    const GraphMemory& graph = memory.graph;
    const int32_t n_threads = Ranks::Size(p);
    if (!options.weighted) {
      const int32_t target = GraphWaves<kWords>(p, graph, shared.target);
      // Where no wave was needed no barrier was passed, and others may still read it.
      if (threadIdx.x == 0 && target != shared.target) shared.target = target;
      return;
    }
    float value = shared.bound;
    // Each rank's load changes by its first lane; a barrier before and after.
    const auto allow = [&](int32_t sign, float of_value) {
      const int32_t rank = Ranks::Rank(0);
      if (Ranks::Lane() == 0 && rank < p.ep_size) {
        graph.load[rank] -= sign * TokenLimit(of_value, memory.weight[rank]);
      }
    };
    allow(1, value);
    Ranks::Sync(n_threads);
    GraphWaves<kWords>(
        p, graph, 0, [&](int32_t (&load)[kWords], const RankSet<kWords>& seen, int32_t) {
          int64_t tokens = 0;
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            const int32_t r = 32 * w + static_cast<int32_t>(threadIdx.x & 31);
            if (r < p.ep_size && !seen.Has(r)) {
              tokens += static_cast<int64_t>(load[w]) + TokenLimit(value, memory.weight[r]);
            }
          }
          const float next = LeastValue(p.ep_size, memory.weight, WarpSum(tokens),
                                        [&](int32_t r) { return !seen.Has(r); });
          Ranks::Sync(n_threads);  // All have read the loads.
          allow(-1, value);
          allow(1, next);
          value = next;
          return 0;
        });
    Ranks::Sync(n_threads);
    allow(-1, value);
    if (threadIdx.x == 0) shared.bound = value;
  }
};

// Solves one batch element with one block.
template <typename Solver, typename Load>
__global__ void __launch_bounds__(std::max(Solver::kThreads, 256), 1)
    HostIpmKernel(Problem p, Sources sources, IpmOptions options, IpmOperands first_in,
                  SolveResults first_out) {
  extern __shared__ __align__(16) char dynamic[];
  __shared__ Shared shared;
  const int32_t element = blockIdx.x;
  const IpmOperands in = BatchElement(p, sources, first_in, element);
  const SolveResults out = BatchElement(p, first_out, element);
  const HostMemory memory(p, Solver::kWords, dynamic + sizeof(typename Solver::Memory));
  const HostBlock<Solver, Load> block = {
      p,       sources,
      options, in,
      memory,  *reinterpret_cast<typename Solver::Memory*>(dynamic),
      shared,  reinterpret_cast<Load*>(out.quota)};
  block.LoadGroup();
  const bool overflow = block.Bound();
  if (threadIdx.x == 0) shared.overflow = overflow;
  if (overflow) {
    block.GiveUp();
  } else {
    block.Solve();
    if constexpr (std::is_same_v<Load, float>) {
      block.FinishReal();
    } else {
      block.FinishTokens();
    }
  }
  if (threadIdx.x == 0) WriteProof(options, shared, *memory.graph.status, 0, out);
}

template <int kRanks, int kParts>
IpmChoice OfHosts(const IpmOptions& options) {
  using Solver = HostInteriorPoint<kRanks, kParts>;
  constexpr int32_t kThreads = std::max(Solver::kThreads, 256);
  return {options.floats ? HostIpmKernel<Solver, float> : HostIpmKernel<Solver, int32_t>,
          Solver::kThreads, kThreads, sizeof(typename Solver::Memory)};
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_HOST_KERNEL_CUH_
