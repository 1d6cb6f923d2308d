#include <algorithm>
#include <type_traits>

#include "cuda/interior.cuh"
#include "cuda/ipm.h"
#include "cuda/repair.cuh"
#include "cuda/solver.cuh"
#include "cuda/solver.h"

namespace lplb::cuda {
namespace {

// What a group needs in shared memory besides the interior point's own.
struct IpmMemory {
  float4* ends;            // [n_edges], see Interior
  float *cap, *flow, *H;   // [n_edges]
  int32_t *src, *dst;      // [n_edges]
  int32_t *units, *moved;  // [n_edges], capacities and plan in tokens, or in units for the proof
  int32_t *base, *level;   // [n_ranks]
  int32_t* cut;            // [n_ranks], whether a rank is in the best cut
  int32_t* load;           // [n_ranks], of the rounded plan
  float* weight;           // [n_ranks]
  int32_t* own;            // [n_ranks, n_local], words as in loads

  static __host__ __device__ int64_t Bytes(const Problem& p) {
    const int64_t edges = static_cast<int64_t>(p.group_size) * p.n_columns;
    return edges * (16 + 7 * 4) + p.group_size * 4 * (5 + static_cast<int64_t>(p.n_local));
  }

  __device__ IpmMemory(const Problem& p, char* memory) {
    const int32_t edges = p.group_size * p.n_columns;
    ends = reinterpret_cast<float4*>(memory);
    cap = reinterpret_cast<float*>(ends + edges);
    flow = cap + edges;
    H = flow + edges;
    src = reinterpret_cast<int32_t*>(H + edges);
    dst = src + edges;
    units = dst + edges;
    moved = units + edges;
    base = moved + edges;
    level = base + p.group_size;
    cut = level + p.group_size;
    load = cut + p.group_size;
    weight = reinterpret_cast<float*>(load + p.group_size);
    own = reinterpret_cast<int32_t*>(weight + p.group_size);
  }
};

// What the threads of the block tell one another.
struct Shared {
  float largest;
  float bound;
  float weight_sum;
  int32_t most;
  int32_t target;
  int32_t max_load;
  float proven;
  unsigned long long excess;
  int32_t unseen;
  int32_t status;
};

__device__ __forceinline__ float WarpSum(float value) {
  float values[1] = {value};
  Team<32>::SumUp<0>(values);
  return values[0];
}

// Loads the group's own experts, a tile of threads per rank; returns the status bits that a thread
// has seen. The ranks' sums go to memory.base, where they are int32 and fit, and to `base`.
template <typename Load>
__device__ __forceinline__ int32_t LoadLoads(const Problem& p, const Sources& sources,
                                             const SolveOperands& in, int32_t group,
                                             const IpmMemory& memory, float* base) {
  constexpr bool kFloats = std::is_same_v<Load, float>;
  using Sum = std::conditional_t<kFloats, float, int64_t>;
  const Tile tile(p);
  const int32_t first_of_warp = (threadIdx.x & ~31) >> p.tile_log2;
  const Load* loads = reinterpret_cast<const Load*>(in.loads);
  int32_t status = 0;
#pragma unroll 1
  for (int32_t step = 0; first_of_warp + step < p.group_size; step += tile.n) {
    const int32_t rank = tile.index + step;
    const int32_t first_slot = (group * p.group_size + rank) * p.slots_per_rank;
    Sum sum = 0;
#pragma unroll 1
    for (int32_t k = tile.lane; k < p.n_local && rank < p.group_size; k += tile.width) {
      const int32_t known = KnownExpert(p, in.phy2log[first_slot + k]);
      Sum total = 0;
#pragma unroll 1
      for (int32_t s = 0; s < sources.n_sources; ++s) {
        const Load load = loads[static_cast<int64_t>(s) * sources.row + known];
        if (load >= 0) {
          total += load;
        } else {
          status |= kNegativeLoad;  // NaN, too.
        }
      }
      if constexpr (!kFloats) {
        if (total > kInt32Max) {
          status |= kLoadOverflow;
          total = kInt32Max;
        }
      }
      reinterpret_cast<Load*>(memory.own)[rank * p.n_local + k] = static_cast<Load>(total);
      sum += total;
    }
#pragma unroll
    for (int32_t distance = 16; distance > 0; distance /= 2) {
      const Sum other = __shfl_xor_sync(kAllLanes, sum, distance);
      if (distance < tile.width) sum += other;
    }
    if (tile.lane == 0 && rank < p.group_size) {
      if constexpr (!kFloats) {
        if (sum > kInt32Max) status |= kLoadOverflow;
        memory.base[rank] = static_cast<int32_t>(sum);
      }
      base[rank] = static_cast<float>(sum);
    }
  }
  return status;
}

// Looks for contradictions between phy2log, log2phy and r2o in the group's slots first,
// first + stride, …
__device__ __forceinline__ int32_t CheckSlots(const Problem& p, const SolveOperands& in,
                                              int32_t group, const IpmMemory& memory, int32_t first,
                                              int32_t stride) {
  const int32_t first_slot = group * p.group_size * p.slots_per_rank;
  int32_t status = 0;
#pragma unroll 1
  for (int32_t i = first; i < p.group_size * p.slots_per_rank; i += stride) {
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t k = i - rank * p.slots_per_rank;
    const bool copy = k >= p.n_local;
    const int32_t expert = in.phy2log[first_slot + i];
    const int32_t known = KnownExpert(p, expert);
    bool good = expert == known && in.log2phy[known * p.max_replicas + copy] == first_slot + i;
    if (copy) {
      const int32_t local = k - p.n_local;
      const int32_t source = memory.src[rank * p.n_columns + p.by_columns.Remainder(local)];
      good &= expert == in.phy2log[first_slot + source * p.slots_per_rank + local];
    }
    if (!good) status |= kBadPlacement;
  }
  return status;
}

// What an edge could move: the sum over its owner's replicated experts in this column.
template <typename Sum, typename Function>
__device__ __forceinline__ Sum OverColumn(const Problem& p, const IpmMemory& memory, int32_t edge,
                                          Function&& load) {
  const int32_t rank = p.by_columns.Quotient(edge);
  Sum sum = 0;
  if (memory.dst[edge] == rank) return sum;
#pragma unroll 1
  for (int32_t k = edge - rank * p.n_columns; k < p.n_redundant; k += p.n_columns) {
    sum += load(rank * p.n_local + k);
  }
  return sum;
}

// Writes the quotas of the experts first, first + stride, … that no plan changes.
template <typename Load>
__device__ __forceinline__ void WriteFixed(const Problem& p, const IpmMemory& memory, Load* quota,
                                           int32_t first, int32_t stride) {
  const int32_t n_fixed = p.n_local - p.n_redundant;
#pragma unroll 1
  for (int32_t i = first; i < p.group_size * n_fixed; i += stride) {
    const int32_t rank = p.by_fixed.Quotient(i);
    const int32_t k = p.n_redundant + i - rank * n_fixed;
    quota[rank * p.slots_per_rank + k] =
        reinterpret_cast<const Load*>(memory.own)[rank * p.n_local + k];
  }
}

// Writes the quotas of the replicated experts: an edge's tokens come from its experts in order.
template <typename Load>
__device__ __forceinline__ void WriteSplit(const Problem& p, const IpmMemory& memory, Load* quota,
                                           const Load* moved) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.group_size * p.n_redundant; i += blockDim.x) {
    const int32_t rank = p.by_redundant.Quotient(i);
    const int32_t k = i - rank * p.n_redundant;
    const Load* own = reinterpret_cast<const Load*>(memory.own) + rank * p.n_local;
    const int32_t column = p.by_columns.Remainder(k);
    const int32_t edge = rank * p.n_columns + column;
    Load left = moved[edge];
#pragma unroll 1
    for (int32_t j = column; j < k && left > 0; j += p.n_columns) left -= min(left, own[j]);
    const Load away = min(left, own[k]);
    quota[rank * p.slots_per_rank + k] = own[k] - away;
    quota[memory.dst[edge] * p.slots_per_rank + p.n_local + k] = away;
  }
}

// ⌈sum / n⌉ of sum ≥ 0, where it is an int32. A division of 64 bits would cost several times as
// much.
__device__ __forceinline__ int32_t CeilDivide(int64_t sum, int32_t n) {
  const int32_t quotient = static_cast<int32_t>(static_cast<double>(sum) / n);
  // Off by one at most.
  const int64_t rest = sum - static_cast<int64_t>(quotient) * n;
  return quotient + (rest > 0) + (rest > n) - (rest <= -n);
}

// Sum over the warp of values below 2⁴⁷ in size.
__device__ __forceinline__ int64_t WarpSum(int64_t value) {
  const int32_t high = __reduce_add_sync(kAllLanes, static_cast<int32_t>(value >> 16));
  const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value) & 0xffff);
  return (static_cast<int64_t>(high) << 16) + low;
}

// The bounds of the set of all ranks and of the sets of one rank, by one warp.
__device__ __forceinline__ int32_t FirstTarget(const Problem& p, const IpmMemory& memory) {
  int64_t total = 0;
  int64_t alone = 0;
#pragma unroll 1
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
    int64_t stuck = memory.base[r];
    total += stuck;
#pragma unroll 1
    for (int32_t d = 0; d < p.n_columns; ++d) stuck -= memory.units[r * p.n_columns + d];
    alone = max(alone, stuck);
  }
  return max(CeilDivide(WarpSum(total), p.group_size),
             __reduce_max_sync(kAllLanes, static_cast<int32_t>(alone)));
}

// What cannot leave the best cut, exactly, in tokens or units; the cut's size and weight.
struct CutValue {
  int64_t stuck;
  int32_t size;
  float weight;
};

// By one warp.
__device__ __forceinline__ CutValue ValueOfCut(const Problem& p, const IpmMemory& memory) {
  CutValue value = {0, 0, 0};
#pragma unroll 1
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
    if (!memory.cut[r]) continue;
    value.stuck += memory.base[r];
    value.weight += memory.weight[r];
    ++value.size;
#pragma unroll 1
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t edge = r * p.n_columns + d;
      if (!memory.cut[memory.dst[edge]]) value.stuck -= memory.units[edge];
    }
  }
  __syncwarp();
  value.stuck = WarpSum(value.stuck);
  value.size = __reduce_add_sync(kAllLanes, value.size);
  value.weight = WarpSum(value.weight);
  return value;
}

// Largest of the ranks' values ≥ 0, ints or bits of floats, by one warp.
__device__ __forceinline__ int32_t LargestOf(const Problem& p, const int32_t* values) {
  int32_t largest = 0;
#pragma unroll 1
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) largest = max(largest, values[r]);
  return __reduce_max_sync(kAllLanes, largest);
}

// Threads of a block at most: those that solve, and two warps or more for what needs no plan.
constexpr int32_t MostThreads(int32_t solving) { return std::max(solving + 64, 320); }

// Solves one group with one block.
template <int kRanks, int kParts, int kEdges, typename Load>
__global__ void __launch_bounds__(MostThreads(kRanks* kParts))
    IpmKernel(Problem p, Sources sources, IpmOptions options, IpmOperands first_in,
              SolveResults first_out) {
  using Solver = Interior<kRanks, kParts, kEdges>;
  constexpr bool kFloats = std::is_same_v<Load, float>;
  extern __shared__ __align__(16) char dynamic[];
  __shared__ __align__(16) typename Solver::Memory solver_memory;
  __shared__ Shared shared;
  const int32_t group = blockIdx.x % p.n_groups;
  const int64_t element = blockIdx.x / p.n_groups;
  const IpmOperands operands = BatchElement(p, sources, first_in, element);
  const SolveOperands& in = operands.solve;
  const SolveResults out = BatchElement(p, first_out, element);
  const IpmMemory memory(p, dynamic);
  const int32_t warp = threadIdx.x / 32;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t n_edges = p.group_size * p.n_columns;
  const Graph graph = {p.group_size, p.n_columns, memory.src, memory.dst};
  const Load* own = reinterpret_cast<const Load*>(memory.own);
  Load* quota = reinterpret_cast<Load*>(out.quota) +
                static_cast<int64_t>(group) * p.group_size * p.slots_per_rank;

  int32_t status = 0;
  for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
    const int32_t source = in.r2o[i];
    memory.src[i] = source;
    const int32_t rank = p.by_columns.Quotient(i);
    memory.dst[source * p.n_columns + i - rank * p.n_columns] = rank;
  }
  for (int32_t r = threadIdx.x; r < kRanks; r += blockDim.x) {
    const bool live = r < p.group_size;
    const float weight = live && options.weighted ? operands.weights[r] : 1;
    if (!(weight > 0 && weight <= 3e38f)) status |= kNotConverged;
    if (live) memory.weight[r] = weight;
    if (!live) solver_memory.base[r] = 0;
    solver_memory.w[r] = 0;
    solver_memory.y[r] = 0;
    solver_memory.ex[r] = 1;
    solver_memory.q[r] = 0;
  }
  if (threadIdx.x == 0) shared.most = shared.status = 0;
  status |= LoadLoads<Load>(p, sources, in, group, memory, solver_memory.base);
  if (warp == 0) {
    float sum = 0;
    if (options.weighted) {
      for (int32_t r = threadIdx.x; r < p.group_size; r += 32) sum += operands.weights[r];
      sum = WarpSum(sum);
    }
    if (threadIdx.x == 0) shared.weight_sum = sum;
  }
  if (sources.row > p.n_logical) {
    for (int32_t s = threadIdx.x; s < sources.n_sources; s += blockDim.x) {
      const int64_t last = static_cast<int64_t>(s) * sources.row + p.n_logical;
      if (reinterpret_cast<const Load*>(in.loads)[last] != 0) status |= kInvalidIndex;
    }
  }
  const bool equal = __syncthreads_or(status & kNotConverged) || !options.weighted;

  for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
    if constexpr (kFloats) {
      memory.cap[i] = OverColumn<float>(p, memory, i, [&](int32_t k) { return own[k]; });
    } else {
      // Wraps only where the rank's load has overflowed too.
      const uint32_t tokens = OverColumn<uint32_t>(p, memory, i, [&](int32_t k) { return own[k]; });
      memory.units[i] = static_cast<int32_t>(tokens);
      memory.cap[i] = static_cast<float>(tokens);
    }
  }
  __syncthreads();
  for (int32_t r = threadIdx.x; r < p.group_size; r += blockDim.x) {
    const float mean = shared.weight_sum / static_cast<float>(p.group_size);
    const float weight = equal ? 1 : memory.weight[r] / mean;
    memory.weight[r] = weight;
    solver_memory.w[r] = weight;
    // A plan's rank loads never pass this sum, so where it fits nothing overflows.
    using Sum = std::conditional_t<kFloats, float, int64_t>;
    Sum most = kFloats ? static_cast<Sum>(solver_memory.base[r]) : static_cast<Sum>(memory.base[r]);
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t edge = memory.src[r * p.n_columns + d] * p.n_columns + d;
      most += kFloats ? static_cast<Sum>(memory.cap[edge]) : static_cast<Sum>(memory.units[edge]);
    }
    if constexpr (kFloats) {
      if (!(most <= 3.4e38f)) status |= kLoadOverflow;
      atomicMax(&shared.most, __float_as_int(most));
    } else {
      if (most > kInt32Max) status |= kLoadOverflow;
    }
  }
  const bool overflow = __syncthreads_or(status & kLoadOverflow);

  if (overflow) {
    for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) memory.moved[i] = 0;
    status |= CheckSlots(p, in, group, memory, threadIdx.x, blockDim.x);
    WriteFixed(p, memory, quota, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) {
      shared.max_load = kInt32Max;
      shared.largest = kFloats ? __int_as_float(0x7f800000) : static_cast<float>(kInt32Max);
      shared.target = 0;
      shared.proven = 0;
    }
    __syncthreads();
  } else {
    if (threadIdx.x < Solver::kThreads) {
      Solver solver(graph, solver_memory,
                    {memory.cap, memory.flow, memory.H, memory.ends, memory.cut});
      const auto result = solver.Run();
      if (threadIdx.x == 0) {
        shared.largest = result.largest;
        shared.bound = result.bound;
      }
    } else {
      // The other warps do what needs no plan.
      const int32_t first = static_cast<int32_t>(threadIdx.x) - Solver::kThreads;
      const int32_t stride = static_cast<int32_t>(blockDim.x) - Solver::kThreads;
      if (!kFloats && first < 32) {
        const int32_t target = FirstTarget(p, memory);
        if (first == 0) shared.target = target;
      }
      status |= CheckSlots(p, in, group, memory, first, stride);
      WriteFixed(p, memory, quota, first, stride);
    }
    __syncthreads();

    bool converged = shared.largest - shared.bound <= kConvergedGap * shared.largest;
    const bool last_warp = warp == n_warps - 1;
    if constexpr (kFloats) {
      // For the proof, loads in units of a power of two that are rounded the safe way; and the
      // largest load of the plan.
      const int32_t exponent = UnitExponent(__int_as_float(shared.most));
      for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
        memory.units[i] = OverColumn<int32_t>(p, memory, i, [&](int32_t k) {
          return static_cast<int32_t>(ceilf(ldexpf(own[k], exponent)));
        });
      }
      for (int32_t r = warp; r < p.group_size; r += n_warps) {
        int64_t units = 0;
        float load = 0;
        for (int32_t k = threadIdx.x & 31; k < p.n_local; k += 32) {
          const float value = own[r * p.n_local + k];
          units += static_cast<int32_t>(floorf(ldexpf(value, exponent)));
          load += value;
        }
        units = WarpSum(units);
        load = WarpSum(load);
        for (int32_t d = 0; d < p.n_columns; ++d) {
          const int32_t edge = r * p.n_columns + d;
          load += memory.flow[memory.src[edge] * p.n_columns + d] - memory.flow[edge];
        }
        if ((threadIdx.x & 31) == 0) {
          memory.base[r] = static_cast<int32_t>(units);
          memory.load[r] = __float_as_int(fmaxf(load, 0) / memory.weight[r]);
        }
      }
      __syncthreads();
      if (last_warp) {
        const CutValue cut = ValueOfCut(p, memory);
        const int32_t largest = LargestOf(p, memory.load);
        if ((threadIdx.x & 31) == 0) {
          shared.proven = Provable(cut.stuck, -exponent, cut.weight, p.group_size);
          shared.largest = __int_as_float(largest);
        }
      }
      __syncthreads();
      converged = shared.largest - shared.proven <= kConvergedGap * shared.largest;
    } else {
      for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
        memory.moved[i] = RoundTokens(memory.flow[i], memory.units[i]);
      }
      int32_t enough = 0;
      if (threadIdx.x < p.group_size) {
        const int32_t r = threadIdx.x;
        // Where the plan at hand is best ⌈t·w_r⌉ tokens are enough for every rank r.
        if (options.weighted) enough = EnoughTokens(shared.largest, memory.weight[r]);
        int32_t load = memory.base[r] - enough;
#pragma unroll 1
        for (int32_t d = 0; d < p.n_columns; ++d) {
          const int32_t to = r * p.n_columns + d;
          const int32_t from = memory.src[to] * p.n_columns + d;
          load += RoundTokens(memory.flow[from], memory.units[from]) -
                  RoundTokens(memory.flow[to], memory.units[to]);
        }
        memory.load[r] = load;
      }
      if (last_warp) {
        const CutValue cut = ValueOfCut(p, memory);
        if ((threadIdx.x & 31) == 0) {
          if (options.weighted) {
            shared.proven = Provable(cut.stuck, 0, cut.weight, p.group_size);
            shared.target = 0;
          } else if (cut.stuck > 0) {
            shared.target = max(shared.target, CeilDivide(cut.stuck, cut.size));
          }
        }
      }
      __syncthreads();
      int32_t target = shared.target;
      if (options.repair) {
        target = Repair(
            graph,
            {memory.units, memory.moved, memory.load, memory.level, &shared.excess, &shared.unseen},
            target);
      }
      if (options.repair && !options.weighted) {
        // Nobody is above the target, which is proven.
        converged = true;
        if (threadIdx.x == 0) shared.max_load = shared.target = target;
      } else {
        if (options.weighted && threadIdx.x < p.group_size) {
          const int32_t load = memory.load[threadIdx.x] + enough;
          memory.load[threadIdx.x] =
              __float_as_int(static_cast<float>(load) / memory.weight[threadIdx.x]);
        }
        __syncthreads();
        if (warp == 0) {
          const int32_t largest = LargestOf(p, memory.load);
          if (threadIdx.x == 0) {
            shared.max_load = largest;
            if (options.weighted) shared.largest = __int_as_float(largest);
          }
        }
      }
    }
    if (!converged) status |= kNotConverged;
  }

  if constexpr (kFloats) {
    WriteSplit(p, memory, quota,
               overflow ? reinterpret_cast<const float*>(memory.moved) : memory.flow);
  } else {
    WriteSplit(p, memory, quota, memory.moved);
  }
  // Every thread has seen its own part.
  if (status != 0) atomicOr(&shared.status, status);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (options.float_loads_out()) {
      out.max_load[group] = __float_as_int(shared.largest);
      out.lower_bound[group] = __float_as_int(fminf(shared.proven, shared.largest));
    } else {
      out.max_load[group] = shared.max_load;
      out.lower_bound[group] = shared.target;
    }
    out.status[group] = shared.status;
  }
}

__global__ void EmptyKernel() {}

constexpr int64_t kMostSharedBytes = 160 << 10;  // Every supported chip has a little more.
constexpr int32_t kMostEdges = 16;               // Of one thread.

using Kernel = void (*)(Problem, Sources, IpmOptions, IpmOperands, SolveResults);

struct Choice {
  Kernel kernel;
  int32_t threads;  // At least.
  int64_t bytes;    // Static shared memory.
};

template <int kRanks, int kParts, int kEdges>
Choice Make(const IpmOptions& options) {
  using Solver = Interior<kRanks, kParts, kEdges>;
  return {options.floats ? IpmKernel<kRanks, kParts, kEdges, float>
                         : IpmKernel<kRanks, kParts, kEdges, int32_t>,
          Solver::kThreads, sizeof(typename Solver::Memory) + sizeof(Shared)};
}

template <int kRanks, int kParts>
Choice WithEdges(const Problem& p, const IpmOptions& options) {
  const int32_t threads = std::max(32, kRanks * kParts);
  const int32_t edges = (p.group_size * p.n_columns + threads - 1) / threads;
  if (edges <= 1) return Make<kRanks, kParts, 1>(options);
  if (edges <= 4) return Make<kRanks, kParts, 4>(options);
  if (edges <= kMostEdges) return Make<kRanks, kParts, kMostEdges>(options);
  return {nullptr, 0, 0};
}

Choice Choose(const Problem& p, const IpmOptions& options) {
  if (p.group_size <= 8) return WithEdges<8, 1>(p, options);
  if (p.group_size <= 16) return WithEdges<16, 2>(p, options);
  if (p.group_size <= 32) return WithEdges<32, 4>(p, options);
  if (p.group_size <= 64) return WithEdges<64, 4>(p, options);
  return WithEdges<128, 4>(p, options);
}

}  // namespace

bool IpmFitsOneBlock(const Problem& problem) {
  if (problem.group_size > kMaxGroupSize) return false;
  const Choice choice = Choose(problem, {});
  return choice.kernel != nullptr &&
         IpmMemory::Bytes(problem) + choice.bytes + 1024 <= kMostSharedBytes;
}

cudaError_t LaunchIpm(const Problem& problem, const Sources& sources, const IpmOptions& options,
                      int64_t batch, const IpmOperands& in, const SolveResults& out,
                      cudaStream_t stream) {
  const int64_t blocks = batch * problem.n_groups;
  if (blocks == 0) return cudaSuccess;
  const Choice choice = Choose(problem, options);
  const int64_t bytes = IpmMemory::Bytes(problem);
  if (bytes + choice.bytes > (48 << 10)) {
    const cudaError_t error = cudaFuncSetAttribute(
        choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  // A thread per expert, and at least two warps for what needs no plan.
  const int32_t experts = problem.group_size << problem.tile_log2;
  const int32_t threads =
      std::clamp((experts + 31) / 32 * 32, choice.threads + 64, MostThreads(choice.threads));
  choice.kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(problem, sources,
                                                                           options, in, out);
  return cudaGetLastError();
}

cudaError_t LaunchEmpty(cudaStream_t stream) {
  EmptyKernel<<<1, 32, 0, stream>>>();
  return cudaGetLastError();
}

}  // namespace lplb::cuda
