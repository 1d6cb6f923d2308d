#include <algorithm>

#include "cuda/graph_solver.h"
#include "cuda/launch.cuh"
#include "cuda/solver.cuh"
#include "cuda/solver.h"

namespace lplb::cuda {
namespace {

// Threads beyond this would take registers that the solver needs.
constexpr int32_t kMaxThreads = 544;

// blockIdx.x, read where it stands: what depends on it is then not computed before the solve, which
// all threads wait for.
__device__ __forceinline__ int32_t LateBlockIndex() {
  int32_t index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}

template <int kWords, int kColumns>
__global__ void __launch_bounds__(kMaxThreads, 1)
    SolveKernel(Problem p, Sources sources, SolveOperands first_in, SolveResults first_out) {
  extern __shared__ int2 total[];  // [n_logical], then the groups'
  const Groups groups = {static_cast<int32_t>(blockIdx.y), 1};
  const int32_t element = blockIdx.x;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const GroupMemory memory(p, 1, reinterpret_cast<int32_t*>(total + p.n_logical));

  PrefetchedSlot fetched = PrefetchSlot<Block>(p, in, groups);
  // The last warp has no expert to load.
  const int32_t helper =
      static_cast<int32_t>(threadIdx.x) - (static_cast<int32_t>(blockDim.x) - 32);
  if (helper >= 0) {
    int32_t invalid = 0;
    if (sources.row > p.n_logical) {
#pragma unroll 1
      for (int32_t s = helper; s < sources.n_sources; s += 32) {
        invalid |= in.loads[s * sources.row + p.n_logical];
      }
    }
    const bool any_invalid = __any_sync(kFullWarp, invalid != 0);
    if (helper == 0) *memory.status = any_invalid ? kInvalidIndex : 0;
    LoadTopology(p, in.r2o, memory, helper, 32);
  }
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
    total[e] = SumSources(in.loads, sources, e);
  }
  FetchHome(p, in, fetched);
  __syncthreads();
  LoadRanks<Block>(p, in, groups, fetched, SummedTotals{total}, memory);
  CheckPrefetched(p, groups, fetched, memory);
  __syncthreads();
  int32_t* quota =
      BatchElement(p, first_out, element).quota + groups.first * p.group_size * p.slots_per_rank;
  SolveGroups<kWords, kColumns, Block>(
      p, in, groups, memory, quota, [&](int32_t, const Proof& proof) {
        const auto out = BatchElement(p, first_out, LateBlockIndex());
        out.max_load[groups.first] = proof.max_load;
        out.lower_bound[groups.first] = proof.lower_bound;
      });
  // SolveGroups ends with quotas; the status was complete at its barrier.
  if (threadIdx.x == 0) {
    BatchElement(p, first_out, element).status[groups.first] = *memory.status;
  }
}

}  // namespace

int64_t SolveSharedBytes(const Problem& problem) {
  if (problem.n_columns == 0) return GraphSolverBytes(problem);
  return static_cast<int64_t>(problem.n_logical) * sizeof(int2) +
         static_cast<int64_t>(GroupMemory::Words(problem, 1)) * sizeof(int32_t);
}

cudaError_t LaunchSolve(const Problem& problem, const Sources& sources, int64_t batch,
                        const SolveOperands& in, const SolveResults& out, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  if (problem.n_columns == 0) {
    return LaunchSolveGraph(problem, sources, batch, in, out, StartFrom::kEqualShares, stream);
  }
  // A thread per expert, and a warp for what needs no loads.
  const int32_t experts = problem.group_size << problem.tile_log2;
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(batch), problem.n_groups);
  launch.threads = std::clamp((experts + 31) / 32 * 32, 128, kMaxThreads - 32) + 32;
  launch.shared_bytes = SolveSharedBytes(problem);
  return WithSolverShape(problem, [&](auto shape) {
    return Launch(SolveKernel<decltype(shape)::kWords, decltype(shape)::kColumns>, launch, stream,
                  problem, sources, in, out);
  });
}

}  // namespace lplb::cuda
