// The kernel of the interior point. It takes long to compile, so each number of ranks is compiled
// in a file of its own, ranks_<number>.cu.
#ifndef LPLB_CUDA_IPM_KERNEL_CUH_
#define LPLB_CUDA_IPM_KERNEL_CUH_

#include <algorithm>
#include <type_traits>

#include "cuda/ipm.h"
#include "cuda/ipm/load.cuh"
#include "cuda/ipm/prove.cuh"

namespace lplb::cuda {

// The most threads of a block: those that solve, and others for the work that needs no plan, as
// long as the solving threads keep enough registers.
template <typename Solver>
constexpr int32_t MostThreads() {
  constexpr int32_t kSolving = Solver::kThreads;
  if (kSolving >= 512 || Solver::TableOf::kWholeBlock) return kSolving;
  return kSolving == 32 ? 320 : kSolving <= 128 ? 256 : kSolving + 64;
}

// One group as its block sees it, with loads of type Load.
template <typename Solver, typename Load>
struct IpmBlock {
  using TeamOf = typename Solver::TeamOf;
  static constexpr bool kFloats = std::is_same_v<Load, float>;

  const Problem& p;
  const Sources& sources;
  const IpmOptions& options;
  const IpmOperands& in;
  const IpmMemory& memory;
  typename Solver::Memory& solver;
  Shared& shared;
  const Groups groups;
  Load* quota;  // Starts at the group's first slot.

  // Loads the topology, the weights and the loads of all ranks. Ends with a barrier.
  __device__ __forceinline__ void LoadGroup() const {
    const PrefetchedSlot fetched =
        PrefetchSlot<Block>(p, in.solve, groups);  // Arrives behind the barrier.
    const int32_t n_edges = p.group_size * p.n_columns;
    if (threadIdx.x == 0) {
      *memory.group.status = 0;
      shared.most = shared.max_load = 0;
      shared.bound = 0;
    }
    for (int32_t r = threadIdx.x; r < Solver::kMostRanks; r += blockDim.x) {
      solver.base[r] = solver.w[r] = solver.y[r] = solver.q[r] = 0;
      solver.ex[r] = 1;
    }
    __syncthreads();
    if (threadIdx.x >= blockDim.x - 32) {
      const int32_t lane = threadIdx.x & 31;
      LoadTopology(p, in.solve.r2o, memory.group, lane, 32);
      DropBrokenTopology(p, memory.group);
      LoadWeights(p.group_size, options, in.weights, memory.weight, solver.w, memory.group.status);
      for (int32_t i = n_edges + lane; i < PaddedEdges(n_edges); i += 32) {
        memory.ends[i] = make_float4(0, 0, 0, 0);
      }
      CheckInvalid<Load>(p, sources, in.solve.loads, memory.group.status);
    }
    if constexpr (kFloats) {
      LoadRealRanks(p, in.solve, groups, fetched, sources, memory.group, solver.base);
    } else {
      LoadRanks<Block>(p, in.solve, groups, fetched, LoadedTotals{in.solve.loads, sources},
                       memory.group);
    }
    __syncthreads();
  }

  // The work that needs no plan. Threads first, first + stride, … take part.
  __device__ __forceinline__ void DoTheRest(int32_t first, int32_t stride) const {
    if (!kFloats && first < 32) {
      const int32_t target = FirstTarget(p, memory.group);
      if (first == 0) shared.target = target;
    }
    CheckCopies(p, in.solve, groups, memory.group, first, stride);
    CheckOwnSlots(p, in.solve, groups, memory.group, false, first, stride);
    WriteFixedQuotas(p, groups, memory.group, reinterpret_cast<int32_t*>(quota), first, stride);
  }

  // Computes the edges' capacities, and whether some rank could receive too much. Called by the
  // team; every thread gets the answer.
  __device__ __forceinline__ bool Bound() const {
    const GroupMemory& group = memory.group;
    for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += Solver::kThreads) {
      const int32_t rank = p.by_columns.Quotient(i);
      const Load cap = CapacityOf<Load>(p, group, 0, rank, i - rank * p.n_columns);
      if constexpr (!kFloats) group.cap[i] = cap;
      memory.cap[i] = static_cast<float>(cap);
    }
    TeamOf::Sync();
    // A plan's rank loads never exceed this sum, so if it fits, nothing overflows.
    bool overflow = false;
    if (threadIdx.x < p.group_size) {
      using Sum = std::conditional_t<kFloats, float, uint32_t>;
      Sum most = kFloats ? static_cast<Sum>(solver.base[threadIdx.x])
                         : static_cast<Sum>(group.base[threadIdx.x]);  // −1 overflowed earlier.
#pragma unroll 2
      for (int32_t d = 0; d < p.n_columns; ++d) {
        const int32_t edge = group.src[threadIdx.x * p.n_columns + d] * p.n_columns + d;
        if constexpr (kFloats) {
          most += memory.cap[edge];
        } else {
          most = min(most, 1u << 31) + static_cast<Sum>(group.cap[edge]);
        }
      }
      if constexpr (kFloats) {
        overflow = !(fmaxf(most, most / memory.weight[threadIdx.x]) <= kMostLoad);
        atomicMax(&shared.most, __float_as_int(most));
      } else {
        overflow = most > static_cast<Sum>(kInt32Max);
        solver.base[threadIdx.x] = static_cast<float>(group.base[threadIdx.x]);
      }
    }
    return TeamOf::Any(overflow);
  }

  // Finds the interior point's plan and cut. Called by the team.
  __device__ __forceinline__ void Solve() const {
    float back = 1;
    if constexpr (kFloats) {
      // Scales by a power of two first, since the sum of all ranks' loads could overflow.
      const int32_t exponent = Exponent(__int_as_float(shared.most));
      const float power = PowerOfTwo(-exponent);
      back = PowerOfTwo(exponent);
      if (threadIdx.x < p.group_size) solver.base[threadIdx.x] *= power;
      for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += Solver::kThreads) {
        memory.cap[i] *= power;
      }
      TeamOf::Sync();
    }
    const Graph graph = {p.group_size, p.n_columns, p.by_columns, memory.group.src,
                         memory.group.dst};
    Solver(graph, solver, {memory.cap, memory.flow, memory.H, memory.ends, memory.cut}).Run(back);
  }

  // Reports that nothing moves and nothing is proven. Ends with a barrier.
  __device__ __forceinline__ void GiveUp() const {
    for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += blockDim.x) {
      memory.group.moved[i] = 0;
      memory.flow[i] = 0;
    }
    if (threadIdx.x == 0) NoProof<kFloats>(options, shared);
    __syncthreads();
  }

  // Writes the quotas of the replicated experts.
  __device__ __forceinline__ void WriteSplit(const Load* moved) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.group_size * p.n_redundant; i += blockDim.x) {
      FinishCopy(PrepareCopy<Load>(p, memory.group, i), moved, quota);
    }
  }
};

// Solves one group with one block.
template <typename Solver, typename Load>
__global__ void __launch_bounds__(MostThreads<Solver>(), 1)
    IpmKernel(Problem p, Sources sources, IpmOptions options, IpmOperands first_in,
              SolveResults first_out) {
  extern __shared__ __align__(16) char dynamic[];
  __shared__ Shared shared;
  const int32_t element = blockIdx.x;
  const Groups groups = {static_cast<int32_t>(blockIdx.y), 1};
  const IpmOperands in = BatchElement(p, sources, first_in, element);
  const SolveResults out = BatchElement(p, first_out, element);
  const IpmMemory memory(p, dynamic + sizeof(typename Solver::Memory));
  const IpmBlock<Solver, Load> block = {
      p,
      sources,
      options,
      in,
      memory,
      *reinterpret_cast<typename Solver::Memory*>(dynamic),
      shared,
      groups,
      reinterpret_cast<Load*>(out.quota) + groups.first * p.group_size * p.slots_per_rank};

  block.LoadGroup();
  // Warps that do not solve do the work that needs no plan. If all warps solve, all do it first.
  const int32_t busy = blockDim.x > Solver::kThreads ? Solver::kThreads : 0;
  const int32_t thread = threadIdx.x;
  if (thread >= busy) block.DoTheRest(thread - busy, blockDim.x - busy);
  if (thread < Solver::kThreads) {
    const bool overflow = block.Bound();
    if (thread == 0) shared.overflow = overflow;
    if (!overflow) block.Solve();
  }
  __syncthreads();

  const bool overflow = shared.overflow;
  if (overflow) block.GiveUp();
  if constexpr (std::is_same_v<Load, float>) {
    block.WriteSplit(memory.flow);
    if (!overflow) ProveReal(p, memory, block.quota, shared);
  } else {
    if (!overflow) FinishTokens(p, options, memory, shared);
    block.WriteSplit(memory.group.moved);
  }
  if (thread == 0) WriteProof(options, shared, *memory.group.status, groups.first, out);
}

constexpr int32_t kMostEdges = 16;  // Per thread.

using IpmKernelPointer = void (*)(Problem, Sources, IpmOptions, IpmOperands, SolveResults);

struct IpmChoice {
  IpmKernelPointer kernel;
  int32_t threads;       // Threads that solve.
  int32_t most_threads;  // Per block.
  int64_t bytes;         // Shared memory besides IpmMemory's.
};

template <typename Solver>
IpmChoice Make(const IpmOptions& options) {
  return {options.floats ? IpmKernel<Solver, float> : IpmKernel<Solver, int32_t>, Solver::kThreads,
          MostThreads<Solver>(), sizeof(typename Solver::Memory)};
}

template <int kRanks, int kParts, template <int, int> typename Factor = Table>
IpmChoice WithEdges(const Problem& p, const IpmOptions& options) {
  const int32_t threads = std::max(32, kRanks * kParts);
  const int32_t edges = (p.group_size * p.n_columns + threads - 1) / threads;
  if (edges <= 1) return Make<InteriorPoint<kRanks, kParts, 1, Factor>>(options);
  if (edges <= 4) return Make<InteriorPoint<kRanks, kParts, 4, Factor>>(options);
  if (edges <= kMostEdges) return Make<InteriorPoint<kRanks, kParts, kMostEdges, Factor>>(options);
  return {};
}

// The kernels that each file of one number of ranks provides.
IpmChoice IpmOf8(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf16(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf32(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf64(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf128(const Problem& p, const IpmOptions& options);
IpmChoice IpmWithCuSolverDx(const Problem& p, const IpmOptions& options);
// The same for any placement.
IpmChoice IpmOfHosts16(const IpmOptions& options);
IpmChoice IpmOfHosts32(const IpmOptions& options);
IpmChoice IpmOfHosts64(const IpmOptions& options);
IpmChoice IpmOfHosts128(const IpmOptions& options);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_KERNEL_CUH_
