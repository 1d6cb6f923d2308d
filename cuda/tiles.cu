// Exact solvers for slots that cost tiles, see lplb_jax/reference/solver.py and graph.py. They are
// kernels of their own, so that the kernels that count tokens are unaffected.
#include <algorithm>

#include "cuda/graph_tiles.cuh"
#include "cuda/launch.cuh"
#include "cuda/solver.cuh"
#include "cuda/solver.h"
#include "cuda/tiles.h"

namespace lplb::cuda {
namespace {

constexpr int32_t kMaxThreads = 512;

// A rank's base load in tiles. Sets a status bit if it is negative.
__device__ __forceinline__ int32_t BaseTilesOf(const Costs& costs, int32_t rank, int32_t* status) {
  const int32_t given = costs.base_load[rank];
  if (given < 0) atomicOr(status, kNegativeLoad);
  return max(given, 0);
}

// Whether sources report ids that name no expert.
__device__ __forceinline__ int32_t InvalidIn(const Problem& p, const Sources& sources,
                                             const int32_t* loads) {
  int32_t status = 0;
  if (sources.row > p.n_logical) {
#pragma unroll 1
    for (int32_t s = threadIdx.x; s < sources.n_sources; s += blockDim.x) {
      if (loads[s * sources.row + p.n_logical] != 0) status = kInvalidIndex;
    }
  }
  return status;
}

// Any placement.

template <int kWords>
__global__ void __launch_bounds__(kMaxThreads, 1)
    SolveGraphCostsKernel(Problem p, Sources sources, SolveOperands first_in, Costs first_costs,
                          SolveResults first_out) {
  extern __shared__ int2 total[];  // [n_logical], then the graph, quotas [n_physical], PlacesWords
  const int32_t element = blockIdx.x;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const Costs costs = BatchElement(p, first_costs, element);
  const SolveResults out = BatchElement(p, first_out, element);
  int32_t* const memory = reinterpret_cast<int32_t*>(total + p.n_logical);
  GraphMemory graph(p, kWords, memory);
  int32_t* const tiles = memory + GraphMemory::Words(p, kWords);  // by slot
  const PrefetchedGraph fetched = PrefetchGraph(p, blockDim.x, in.phy2log, in.log2phy);
  const PrefetchedTotals loads(p, in.loads);
  BaseTiles base(p, costs);
  ClearGraph<Block>(p, base, graph.mask, graph);
  loads.Store(p, sources, total);
  BuildGraph<kWords, Block>(p, in.phy2log, in.log2phy, fetched, graph);
  const int32_t wrong = base.status() | InvalidIn(p, sources, in.loads);
  if (wrong != 0) atomicOr(graph.status, wrong);
  const SummedTotals totals = {total};
  const TileProof proof =
      SolveTiles<kWords, Block>(p, totals, costs, base.small(), graph, tiles, tiles + p.n_physical);
#pragma unroll 2
  for (int32_t i = threadIdx.x; i < p.n_physical; i += blockDim.x) {
    const int32_t tokens = QuotaOf(totals, graph, i);
    const int32_t cell = CellIn(graph.of_slot[i]);
    const bool is_empty = proof.rows != nullptr && tiles[i] == 0;
    out.quota[i] = cell == kNoNumber ? tokens : is_empty ? 0 : proof.TokensOf(tokens, cell);
  }
  if (threadIdx.x == 0) {
    *out.max_load = proof.tiles.max_load;
    *out.lower_bound = proof.tiles.lower_bound;
    *out.status = *graph.status;
    *costs.max_tokens = proof.max_tokens;
  }
}

// Along a topology.

// Words of shared memory besides the totals and the group: the tokens of the ranks' own experts,
// and how many at least must leave home.
int32_t FillWords(const Problem& p) { return p.group_size * (p.n_local + p.n_redundant); }

// Solves the group whose loads are in `memory`. All threads of the block call it after a barrier.
// Ends with a barrier.
template <int kWords, int kColumns>
__device__ __forceinline__ Proof SolveOneGroup(const Problem& p, const GroupMemory& memory,
                                               Proof* shared) {
  if constexpr (kWords > 0) {
    if (threadIdx.x < 32) {
      const Proof proof = SolveInWarp<kWords, kColumns>(p, 0, memory);
      if (threadIdx.x == 0) *shared = proof;
    }
  } else {
    const Proof proof = SolveInBlock<Block>(p, 0, memory);
    if (threadIdx.x == 0) *shared = proof;
  }
  __syncthreads();
  return *shared;
}

template <int kWords, int kColumns>
__global__ void __launch_bounds__(kMaxThreads, 1)
    SolveCostsKernel(Problem p, Sources sources, SolveOperands first_in, Costs first_costs,
                     SolveResults first_out) {
  extern __shared__ int2 total[];  // [n_logical], then the group, then FillWords
  __shared__ Proof shared_proof;
  const Groups groups = {static_cast<int32_t>(blockIdx.y), 1};
  const int32_t element = blockIdx.x;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const Costs costs = BatchElement(p, first_costs, element);
  const SolveResults out = BatchElement(p, first_out, element);
  int32_t* const words = reinterpret_cast<int32_t*>(total + p.n_logical);
  const GroupMemory memory(p, 1, words);
  int32_t* const tokens = words + GroupMemory::Words(p, 1);
  int32_t* const least = tokens + p.group_size * p.n_local;
  const int32_t first_rank = groups.first * p.group_size;
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = blockDim.x;
  const int32_t n_own = p.group_size * p.n_local;
  const int32_t n_copies = p.group_size * p.n_redundant;

  if (thread == 0) *memory.status = 0;
  LoadTopology(p, in.r2o, memory, thread, n_threads);
#pragma unroll 1
  for (int32_t e = thread; e < p.n_logical; e += n_threads) {
    total[e] = SumSources(in.loads, sources, e);
  }
  const PrefetchedSlot fetched = PrefetchSlot<Block>(p, in, groups);
  __syncthreads();
  const int32_t invalid = InvalidIn(p, sources, in.loads);
  if (invalid != 0) atomicOr(memory.status, invalid);
  LoadRanks<Block>(p, in, groups, fetched, SummedTotals{total}, memory);
  CheckCopies(p, in, groups, memory, thread, n_threads);
  CheckOwnSlots(p, in, groups, memory, false, thread, n_threads);
  __syncthreads();

  // The most tokens that a rank could have; see SolveInBlock.
  bool too_large = false;
#pragma unroll 1
  for (int32_t r = thread; r < p.group_size; r += n_threads) {
    int64_t most = static_cast<uint32_t>(memory.base[r]);  // −1 overflowed earlier.
    most +=
        static_cast<int64_t>(BaseTilesOf(costs, first_rank + r, memory.status)) * costs.TileRows();
#pragma unroll 1
    for (int32_t d = 0; d < p.n_columns; ++d) {
      most += CapacityOf<int32_t>(p, memory, 0, memory.src[r * p.n_columns + d], d);
    }
    too_large |= most > kInt32Max;
  }
  too_large = __syncthreads_or(too_large);
  if (too_large && thread == 0) atomicOr(memory.status, kLoadOverflow);

  // From here on, tokens are in `tokens`; `own` and `base` hold the tiles to balance.
#pragma unroll 1
  for (int32_t i = thread; i < n_own; i += n_threads) {
    tokens[i] = memory.own[i];
    memory.own[i] = costs.TilesOf(tokens[i]);
  }
  __syncthreads();
  Proof proof = {kInt32Max, 0};
  int32_t max_tokens = kInt32Max;
  if (!too_large) {
#pragma unroll 1
    for (int32_t r = thread; r < p.group_size; r += n_threads) {
      int32_t sum = max(costs.base_load[first_rank + r], 0);
#pragma unroll 1
      for (int32_t k = 0; k < p.n_local; ++k) sum += memory.own[r * p.n_local + k];
      memory.base[r] = sum;
    }
    __syncthreads();
    proof = SolveOneGroup<kWords, kColumns>(p, memory, &shared_proof);
    max_tokens = proof.max_load;
  }

  // How many tokens at least must leave home, and the room of experts with tiles at both ends.
#pragma unroll 1
  for (int32_t i = thread; i < n_copies; i += n_threads) {
    const int32_t rank = p.by_redundant.Quotient(i);
    const int32_t own = rank * p.n_local + i - rank * p.n_redundant;
    const Copy<int32_t> copy = PrepareCopy<int32_t>(p, memory, i);
    int32_t away = 0;
    if (!too_large) away = min(max(memory.moved[copy.edge] - copy.before, 0), copy.load);
    const int32_t home = copy.load - away;
    // Negative, −1 − the tokens that leave, if there is no room at the other end.
    const int32_t leaves = away > 0 ? tokens[own] - home * costs.TileRows() : 0;
    least[i] = away > 0 && home > 0 ? leaves : -1 - leaves;
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t r = thread; r < p.group_size; r += n_threads) {
    int32_t sum = too_large ? 0 : max(costs.base_load[first_rank + r], 0) * costs.TileRows();
#pragma unroll 1
    for (int32_t k = 0; k < p.n_local && !too_large; ++k) sum += tokens[r * p.n_local + k];
    memory.base[r] = sum;
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t i = thread; i < n_copies; i += n_threads) {
    const int32_t rank = p.by_redundant.Quotient(i);
    const int32_t k = i - rank * p.n_redundant;
    const bool has_room = least[i] >= 0;
    const int32_t leaves = has_room ? least[i] : -1 - least[i];
    least[i] = leaves;
    memory.own[rank * p.n_local + k] =
        has_room ? costs.EmptyPlaces(tokens[rank * p.n_local + k]) : 0;
    if (leaves == 0) continue;
    const int32_t holder = memory.dst[rank * p.n_columns + p.by_columns.Remainder(k)];
    atomicAdd(&memory.base[rank], -leaves);
    atomicAdd(&memory.base[min(max(holder, 0), p.group_size - 1)], leaves);
  }
  __syncthreads();
  const bool fill = costs.TileRows() > 1 && !too_large;
  if (fill) max_tokens = SolveOneGroup<kWords, kColumns>(p, memory, &shared_proof).max_load;

  int32_t* const quota = out.quota + first_rank * p.slots_per_rank;
#pragma unroll 1
  for (int32_t i = thread; i < n_own; i += n_threads) {
    const int32_t rank = i / p.n_local;
    const int32_t k = i - rank * p.n_local;
    if (k >= p.n_redundant) quota[rank * p.slots_per_rank + k] = tokens[i];
  }
#pragma unroll 1
  for (int32_t i = thread; i < n_copies; i += n_threads) {
    const Copy<int32_t> copy = PrepareCopy<int32_t>(p, memory, i);
    int32_t away = least[i];
    if (fill) away += min(max(memory.moved[copy.edge] - copy.before, 0), copy.load);
    const int32_t rank = p.by_redundant.Quotient(i);
    quota[copy.own_slot] = tokens[rank * p.n_local + i - rank * p.n_redundant] - away;
    quota[copy.copy_slot] = away;
  }
  if (thread == 0) {
    out.max_load[groups.first] = proof.max_load;
    out.lower_bound[groups.first] = proof.lower_bound;
    out.status[groups.first] = *memory.status;
    costs.max_tokens[groups.first] = max_tokens;
  }
}

}  // namespace

int64_t SolveCostsSharedBytes(const Problem& problem) {
  const int32_t words =
      problem.n_columns == 0 ? problem.n_physical + PlacesWords(problem) : FillWords(problem);
  return SolveSharedBytes(problem) + static_cast<int64_t>(words) * sizeof(int32_t);
}

cudaError_t LaunchSolveCosts(const Problem& problem, const Sources& sources, int64_t batch,
                             const SolveOperands& in, const Costs& costs, const SolveResults& out,
                             cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  LaunchShape launch = {};
  launch.shared_bytes = SolveCostsSharedBytes(problem);
  if (problem.n_columns == 0) {
    const int32_t most = std::max(problem.n_logical, problem.n_physical);
    launch.grid = dim3(static_cast<unsigned>(batch));
    launch.threads = std::clamp((most + 31) / 32 * 32, 256, kMaxThreads);
    return WithGraphWords(problem, [&](auto words) {
      return Launch(SolveGraphCostsKernel<decltype(words)::value>, launch, stream, problem, sources,
                    in, costs, out);
    });
  }
  const int32_t experts = problem.group_size << problem.tile_log2;
  launch.grid = dim3(static_cast<unsigned>(batch), problem.n_groups);
  launch.threads = std::clamp((experts + 31) / 32 * 32, 128, kMaxThreads);
  return WithSolverShape(problem, [&](auto shape) {
    return Launch(SolveCostsKernel<decltype(shape)::kWords, decltype(shape)::kColumns>, launch,
                  stream, problem, sources, in, costs, out);
  });
}

}  // namespace lplb::cuda
