// The kernel of the interior point. It takes long to compile, so each number of ranks has a file of
// its own, ipm_<ranks>.cu, that compiles it.
#ifndef LPLB_CUDA_IPM_CUH_
#define LPLB_CUDA_IPM_CUH_

#include <algorithm>
#include <type_traits>

#include "cuda/interior.cuh"
#include "cuda/ipm.h"
#include "cuda/solver.cuh"

namespace lplb::cuda {

// What a group needs in shared memory besides the interior point's own.
struct IpmMemory {
  float4* ends;           // [edges, padded], see Interior
  float *cap, *flow, *H;  // [n_edges]
  float* weight;          // [n_ranks]
  int32_t* cut;           // [n_ranks], whether a rank is in the best cut
  int32_t* load;          // [n_ranks], of the rounded plan
  GroupMemory group;      // own holds words as in loads; cap tokens, or units for the proof

  static __host__ __device__ int64_t Bytes(const Problem& p) {
    const int64_t edges = static_cast<int64_t>(p.group_size) * p.n_columns;
    return 16 * PaddedEdges(edges) + 4 * (3 * edges + 3 * p.group_size + GroupMemory::Words(p, 1));
  }

  __device__ IpmMemory(const Problem& p, char* memory)
      : ends(reinterpret_cast<float4*>(memory)),
        cap(reinterpret_cast<float*>(ends + PaddedEdges(p.group_size * p.n_columns))),
        flow(cap + p.group_size * p.n_columns),
        H(flow + p.group_size * p.n_columns),
        weight(H + p.group_size * p.n_columns),
        cut(reinterpret_cast<int32_t*>(weight + p.group_size)),
        load(cut + p.group_size),
        group(p, 1, load + p.group_size) {}
};

// What the threads of the block tell one another.
struct Shared {
  float largest;
  float bound;
  float proven;
  int32_t most;
  int32_t target;
  int32_t max_load;  // Or the bits of the largest load / weight.
  bool overflow;
};

__device__ __forceinline__ float WarpSum(float value) {
  float values[1] = {value};
  Team<32>::SumUp<0>(values);
  return values[0];
}

// Totals of int32 loads from the buffer itself: only the group's own experts are wanted.
struct LoadedTotals {
  const int32_t* loads;
  Sources sources;

  __device__ __forceinline__ int2 operator[](int32_t expert) const {
    return SumSources(loads, sources, expert);
  }
};

// LoadRanks for float loads: the ranks' sums go to `base`.
__device__ __forceinline__ void LoadRealRanks(const Problem& p, const SolveOperands& in,
                                              Groups groups, const Ahead& ahead,
                                              const Sources& sources, const GroupMemory& memory,
                                              float* base) {
  const Tile tile(p, blockDim.x);
  const int32_t first_slot = groups.first * p.group_size * p.slots_per_rank;
  const int32_t first_of_warp = (threadIdx.x & ~31) >> p.tile_log2;
  const float* loads = reinterpret_cast<const float*>(in.loads);
  int32_t expert = ahead.expert;
#pragma unroll 1
  for (int32_t step = 0; first_of_warp + step < p.group_size; step += tile.n) {
    const int32_t rank = tile.index + step;
    const int32_t end = rank < p.group_size ? p.n_local : 0;
    const int32_t* slots = in.phy2log + first_slot + rank * p.slots_per_rank;
    bool negative = false;
    float sum = 0;
#pragma unroll 1
    for (int32_t k = tile.lane; k < end; k += tile.width) {
      if (step > 0 || k >= tile.width) expert = slots[k];
      float total = 0;
#pragma unroll 4
      for (int32_t s = 0; s < sources.n_sources; ++s) {
        const float load = loads[s * sources.row + KnownExpert(p, expert)];
        negative |= !(load >= 0);  // NaN, too.
        total += load >= 0 ? load : 0;
      }
      reinterpret_cast<float*>(memory.own)[rank * p.n_local + k] = total;
      sum += total;
    }
#pragma unroll
    for (int32_t distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, sum, distance);
      if (distance < tile.width) sum += other;
    }
    if (negative) atomicOr(memory.status, kNegativeLoad);
    if (tile.lane == 0 && rank < p.group_size) base[rank] = sum;
  }
}

// The ranks' weights with mean 1, by one warp; all 1 where one of them is no speed, which is a
// failure.
__device__ __forceinline__ void LoadWeights(const Problem& p, const IpmOptions& options,
                                            const float* weights, const IpmMemory& memory,
                                            float* w) {
  const int32_t lane = threadIdx.x & 31;
  float sum = 0;
  bool good = options.weighted;
#pragma unroll 1
  for (int32_t r = lane; r < p.group_size && options.weighted; r += 32) {
    const float weight = weights[r];
    good &= weight > 0 && weight <= 3e38f;
    sum += weight;
  }
  good = __all_sync(kFullWarp, good);
  if (options.weighted && !good && lane == 0) atomicOr(memory.group.status, kNotConverged);
  const float mean = good ? WarpSum(sum) / static_cast<float>(p.group_size) : 1;
#pragma unroll 1
  for (int32_t r = lane; r < p.group_size; r += 32) {
    w[r] = memory.weight[r] = good ? weights[r] / mean : 1;
  }
}

// Looks for contradictions between phy2log, log2phy and r2o in the group's slots first,
// first + stride, …
__device__ __forceinline__ void CheckSlots(const Problem& p, const SolveOperands& in, Groups groups,
                                           const GroupMemory& memory, int32_t first,
                                           int32_t stride) {
  const int32_t first_slot = groups.first * p.group_size * p.slots_per_rank;
#pragma unroll 1
  for (int32_t i = first; i < p.group_size * p.slots_per_rank; i += stride) {
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t k = i - rank * p.slots_per_rank;
    const bool copy = k >= p.n_local;
    const int32_t expert = in.phy2log[first_slot + i];
    const int32_t known = KnownExpert(p, expert);
    const int32_t* named = in.log2phy + known * p.max_replicas;
    bool good = expert == known && named[copy] == first_slot + i;
    for (int32_t j = k < p.n_redundant ? 2 : 1; !copy && j < p.max_replicas; ++j) {
      good &= named[j] == -1;
    }
    if (copy) {
      const int32_t local = k - p.n_local;
      const int32_t source = memory.src[rank * p.n_columns + p.by_columns.Remainder(local)];
      good &= expert == in.phy2log[first_slot + source * p.slots_per_rank + local];
    }
    if (!good) atomicOr(memory.status, kBadPlacement);
  }
}

// What an edge could move: the sum over its owner's replicated experts in this column.
template <typename Sum, typename Function>
__device__ __forceinline__ Sum OverColumn(const Problem& p, const GroupMemory& memory, int32_t edge,
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

// Writes the quotas of the replicated experts: an edge's tokens come from its experts in order.
template <typename Load>
__device__ __forceinline__ void WriteSplit(const Problem& p, const GroupMemory& memory, Load* quota,
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

// Sum over the warp of values below 2⁴⁷ in size.
__device__ __forceinline__ int64_t WarpSum(int64_t value) {
  const int32_t high = __reduce_add_sync(kFullWarp, static_cast<int32_t>(value >> 16));
  const uint32_t low = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(value) & 0xffff);
  return (static_cast<int64_t>(high) << 16) + low;
}

// ⌈sum / n⌉ of sum ≥ 0, where it is an int32.
template <typename Number>
__device__ __forceinline__ int32_t CeilDivide(int64_t sum, const Number& n) {
  return CeilDivide(static_cast<uint32_t>(sum >> 16), static_cast<uint32_t>(sum) & 0xffff, n);
}

// The bounds of the set of all ranks and of the sets of one rank, by one warp.
__device__ __forceinline__ int32_t FirstTarget(const Problem& p, const GroupMemory& memory) {
  int64_t total = 0;
  int32_t alone = 0;
#pragma unroll 1
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
    int32_t stuck = memory.base[r];
    total += stuck;
#pragma unroll 1
    for (int32_t d = 0; d < p.n_columns; ++d) stuck -= CapacityOf(p, memory, 0, r, d);
    alone = max(alone, stuck);
  }
  return max(CeilDivide(WarpSum(total), p.by_group), __reduce_max_sync(kFullWarp, alone));
}

// What cannot leave the best cut, exactly, in tokens or units; the cut's size and weight.
struct CutValue {
  int64_t stuck;
  int32_t size;
  float weight;
};

// By one warp.
__device__ __forceinline__ CutValue ValueOfCut(const Problem& p, const IpmMemory& memory) {
  const GroupMemory& group = memory.group;
  CutValue value = {0, 0, 0};
#pragma unroll 1
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
    if (!memory.cut[r]) continue;
    value.stuck += group.base[r];
    value.weight += memory.weight[r];
    ++value.size;
#pragma unroll 2
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t edge = r * p.n_columns + d;
      if (!memory.cut[group.dst[edge]]) value.stuck -= group.cap[edge];
    }
  }
  __syncwarp();
  value.stuck = WarpSum(value.stuck);
  value.size = __reduce_add_sync(kFullWarp, value.size);
  value.weight = WarpSum(value.weight);
  return value;
}

// Raises *largest to the ranks' largest value ≥ 0, ints or bits of floats. All threads call it.
__device__ __forceinline__ void NoteLargest(const Problem& p, int32_t value, int32_t* largest) {
  if ((threadIdx.x & ~31) >= p.group_size) return;
  value = __reduce_max_sync(kFullWarp, threadIdx.x < p.group_size ? value : 0);
  if ((threadIdx.x & 31) == 0) atomicMax(largest, value);
}

// Real loads, after the solve: what is proven, and the plan's largest load. Ends with a barrier.
__device__ __forceinline__ void ProveReal(const Problem& p, const IpmMemory& memory,
                                          Shared& shared) {
  const GroupMemory& group = memory.group;
  const float* own = reinterpret_cast<const float*>(group.own);
  const int32_t warp = threadIdx.x / 32;
  const int32_t n_warps = blockDim.x / 32;
  // For the proof, loads in units of a power of two that are rounded the safe way.
  const int32_t exponent = UnitExponent(__int_as_float(shared.most));
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += blockDim.x) {
    group.cap[i] = OverColumn<int32_t>(p, group, i, [&](int32_t k) {
      return static_cast<int32_t>(ceilf(ldexpf(own[k], exponent)));
    });
  }
#pragma unroll 1
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
      load += memory.flow[group.src[edge] * p.n_columns + d] - memory.flow[edge];
    }
    if ((threadIdx.x & 31) == 0) {
      group.base[r] = static_cast<int32_t>(units);
      atomicMax(&shared.max_load, __float_as_int(fmaxf(load, 0) / memory.weight[r]));
    }
  }
  __syncthreads();
  if (warp == n_warps - 1) {
    const CutValue cut = ValueOfCut(p, memory);
    if ((threadIdx.x & 31) == 0) {
      shared.proven = Provable(cut.stuck, -exponent, cut.weight, p.group_size);
    }
  }
  __syncthreads();
}

// Tokens, after the solve: rounds the plan, proves a bound, and repairs. Ends with a barrier.
__device__ __forceinline__ void FinishTokens(const Problem& p, const IpmOptions& options,
                                             const IpmMemory& memory, Shared& shared) {
  const GroupMemory& group = memory.group;
  const int32_t rank = threadIdx.x;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += blockDim.x) {
    group.moved[i] = RoundTokens(memory.flow[i], group.cap[i]);
  }
  int32_t load = 0;
  int32_t enough = 0;
  if (rank < p.group_size) {
    load = group.base[rank];
#pragma unroll 2
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t to = rank * p.n_columns + d;
      const int32_t from = group.src[to] * p.n_columns + d;
      load += RoundTokens(memory.flow[from], group.cap[from]) -
              RoundTokens(memory.flow[to], group.cap[to]);
    }
    // Where the plan at hand is best ⌈t·w_r⌉ tokens are enough for every rank r.
    if (options.weighted) enough = EnoughTokens(shared.largest, memory.weight[rank]);
    memory.load[rank] = load - enough;
  }
  const auto note = [&](int32_t load) {
    if (options.weighted && rank < p.group_size) {
      load = __float_as_int(static_cast<float>(load) / memory.weight[rank]);
    }
    NoteLargest(p, load, &shared.max_load);
  };
  if (!options.repair) note(load);
  if (threadIdx.x / 32 == blockDim.x / 32 - 1) {
    const CutValue cut = ValueOfCut(p, memory);
    if ((threadIdx.x & 31) == 0) {
      if (options.weighted) {
        shared.proven = Provable(cut.stuck, 0, cut.weight, p.group_size);
        shared.target = 0;
      } else if (cut.stuck > 0) {
        shared.target = max(shared.target, CeilDivide(cut.stuck, SmallDivisor(cut.size)));
      }
    }
  }
  __syncthreads();
  if (!options.repair) return;
  const int32_t target =
      BlockWaves<Block>({p.group_size, p.n_columns, group.src, group.dst, group.cap, group.moved,
                         memory.load, group.level, reinterpret_cast<uint32_t*>(group.sums)},
                        shared.target);
  if (options.weighted) {
    note(rank < p.group_size ? memory.load[rank] + enough : 0);
  } else if (threadIdx.x == 0) {
    shared.max_load = shared.target = target;
  }
  __syncthreads();
}

// Threads of a block at most: those that solve, and others for what needs no plan as far as they
// leave the former enough registers.
template <typename Solver>
constexpr int32_t MostThreads() {
  constexpr int32_t kSolving = Solver::kThreads;
  if (kSolving >= 512 || Solver::TableOf::kWholeBlock) return kSolving;
  return kSolving == 32 ? 320 : kSolving <= 128 ? 256 : kSolving + 64;
}

// Solves one group with one block.
template <typename Solver, typename Load>
__global__ void __launch_bounds__(MostThreads<Solver>(), 1)
    IpmKernel(Problem p, Sources sources, IpmOptions options, IpmOperands first_in,
              SolveResults first_out) {
  using TeamOf = typename Solver::TeamOf;
  constexpr bool kFloats = std::is_same_v<Load, float>;
  extern __shared__ __align__(16) char dynamic[];
  auto& solver_memory = *reinterpret_cast<typename Solver::Memory*>(dynamic);
  __shared__ Shared shared;
  const int32_t element = blockIdx.x;
  const Groups groups = {static_cast<int32_t>(blockIdx.y), 1};
  const IpmOperands operands = BatchElement(p, sources, first_in, element);
  const SolveOperands& in = operands.solve;
  const IpmMemory memory(p, dynamic + sizeof(typename Solver::Memory));
  const GroupMemory& group = memory.group;
  const Ahead ahead = AheadOf<Block>(p, in, groups);  // Arrives behind the barrier.
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = blockDim.x;
  const int32_t n_edges = p.group_size * p.n_columns;

  if (thread == 0) {
    *group.status = 0;
    shared.most = shared.max_load = 0;
  }
  for (int32_t r = thread; r < Solver::kMostRanks; r += n_threads) {
    solver_memory.base[r] = solver_memory.w[r] = solver_memory.y[r] = solver_memory.q[r] = 0;
    solver_memory.ex[r] = 1;
  }
  __syncthreads();
  if (thread >= n_threads - 32) {
    const int32_t lane = thread & 31;
    LoadTopology(p, in.r2o, group, lane, 32);
    DropBrokenTopology(p, group);
    LoadWeights(p, options, operands.weights, memory, solver_memory.w);
    for (int32_t i = n_edges + lane; i < PaddedEdges(n_edges); i += 32) {
      memory.ends[i] = make_float4(0, 0, 0, 0);
    }
    if (sources.row > p.n_logical) {
#pragma unroll 1
      for (int32_t s = lane; s < sources.n_sources; s += 32) {
        const int64_t last = static_cast<int64_t>(s) * sources.row + p.n_logical;
        if (reinterpret_cast<const Load*>(in.loads)[last] != 0) {
          atomicOr(group.status, kInvalidIndex);
        }
      }
    }
  }
  if constexpr (kFloats) {
    LoadRealRanks(p, in, groups, ahead, sources, group, solver_memory.base);
  } else {
    LoadRanks<Block>(p, in, groups, ahead, LoadedTotals{in.loads, sources}, group);
  }
  __syncthreads();

  Load* quota = reinterpret_cast<Load*>(first_out.quota) +
                static_cast<int64_t>(element) * p.n_physical +
                groups.first * p.group_size * p.slots_per_rank;
  // Warps that do not solve do what needs no plan. If all solve, all do that first.
  const int32_t busy = n_threads > Solver::kThreads ? Solver::kThreads : 0;
  if (thread >= busy) {
    const int32_t first = thread - busy;
    if (!kFloats && first < 32) {
      const int32_t target = FirstTarget(p, group);
      if (first == 0) shared.target = target;
    }
    CheckSlots(p, in, groups, group, first, n_threads - busy);
    WriteFixedQuotas(p, groups, group, reinterpret_cast<int32_t*>(quota), first, n_threads - busy);
  }
  if (thread < Solver::kThreads) {
    const Load* own = reinterpret_cast<const Load*>(group.own);
    for (int32_t i = thread; i < n_edges; i += Solver::kThreads) {
      if constexpr (kFloats) {
        memory.cap[i] = OverColumn<float>(p, group, i, [&](int32_t k) { return own[k]; });
      } else {
        // Wraps only where the rank's load has overflowed too.
        group.cap[i] = OverColumn<uint32_t>(p, group, i, [&](int32_t k) { return own[k]; });
        memory.cap[i] = static_cast<float>(group.cap[i]);
      }
    }
    TeamOf::Sync();
    // A plan's rank loads never pass this sum, so where it fits nothing overflows.
    bool overflow = false;
    if (thread < p.group_size) {
      using Sum = std::conditional_t<kFloats, float, uint32_t>;
      Sum most = kFloats ? static_cast<Sum>(solver_memory.base[thread])
                         : static_cast<Sum>(group.base[thread]);  // −1 has overflowed before.
#pragma unroll 2
      for (int32_t d = 0; d < p.n_columns; ++d) {
        const int32_t edge = group.src[thread * p.n_columns + d] * p.n_columns + d;
        if constexpr (kFloats) {
          most += memory.cap[edge];
        } else {
          most = min(most, 1u << 31) + static_cast<Sum>(group.cap[edge]);
        }
      }
      if constexpr (kFloats) {
        overflow = !(most <= 3.4e38f);
        atomicMax(&shared.most, __float_as_int(most));
      } else {
        overflow = most > static_cast<Sum>(kInt32Max);
        solver_memory.base[thread] = static_cast<float>(group.base[thread]);
      }
    }
    overflow = TeamOf::Any(overflow);
    if (thread == 0) shared.overflow = overflow;
    if (!overflow) {
      Solver solver({p.group_size, p.n_columns, p.by_columns, group.src, group.dst}, solver_memory,
                    {memory.cap, memory.flow, memory.H, memory.ends, memory.cut});
      const auto result = solver.Run();
      if (thread == 0) {
        shared.largest = result.largest;
        shared.bound = result.bound;
      }
    }
  }
  __syncthreads();

  const bool overflow = shared.overflow;
  bool converged = true;
  if (overflow) {
    for (int32_t i = thread; i < n_edges; i += n_threads) {
      group.moved[i] = 0;
      memory.flow[i] = 0;
    }
    if (thread == 0) {
      shared.max_load = kFloats            ? 0x7f800000
                        : options.weighted ? __float_as_int(static_cast<float>(kInt32Max))
                                           : kInt32Max;
      shared.target = 0;
      shared.proven = 0;
    }
    __syncthreads();
  } else if constexpr (kFloats) {
    ProveReal(p, memory, shared);
    const float largest = __int_as_float(shared.max_load);
    converged = largest - shared.proven <= kConvergedGap * largest;
  } else {
    FinishTokens(p, options, memory, shared);
    converged = (options.repair && !options.weighted) ||
                shared.largest - shared.bound <= kConvergedGap * shared.largest;
  }
  if constexpr (kFloats) {
    WriteSplit(p, group, quota, memory.flow);
  } else {
    WriteSplit(p, group, quota, group.moved);
  }
  if (thread == 0) {
    const SolveResults out = BatchElement(p, first_out, element);
    out.max_load[groups.first] = shared.max_load;
    out.lower_bound[groups.first] =
        options.float_loads_out()
            ? __float_as_int(fminf(shared.proven, __int_as_float(shared.max_load)))
            : shared.target;
    out.status[groups.first] =
        *group.status | (overflow ? kLoadOverflow : 0) | (converged ? 0 : kNotConverged);
  }
}

constexpr int32_t kMostEdges = 16;  // Of one thread.

using IpmKernelPointer = void (*)(Problem, Sources, IpmOptions, IpmOperands, SolveResults);

struct IpmChoice {
  IpmKernelPointer kernel;
  int32_t threads;       // That solve.
  int32_t most_threads;  // Of a block.
  int64_t bytes;         // Of shared memory, besides IpmMemory's.
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
  if (edges <= 1) return Make<Interior<kRanks, kParts, 1, Factor>>(options);
  if (edges <= 4) return Make<Interior<kRanks, kParts, 4, Factor>>(options);
  if (edges <= kMostEdges) return Make<Interior<kRanks, kParts, kMostEdges, Factor>>(options);
  return {};
}

// What the files of one number of ranks each give.
IpmChoice IpmOf8(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf16(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf32(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf64(const Problem& p, const IpmOptions& options);
IpmChoice IpmOf128(const Problem& p, const IpmOptions& options);
IpmChoice IpmWithCuSolverDx(const Problem& p, const IpmOptions& options);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_CUH_
