// The kernel of the interior point. It takes long to compile, so each number of ranks has a file of
// its own, ipm_<ranks>.cu, that compiles it.
#ifndef LPLB_CUDA_IPM_CUH_
#define LPLB_CUDA_IPM_CUH_

#include <algorithm>
#include <cfloat>
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
  float bound;       // What is proven of float loads, or of load / weight.
  int32_t target;    // What is proven of tokens on ranks of equal speed.
  int32_t max_load;  // Or the bits of a float.
  int32_t most;      // The bits of a float: of real loads, the most of one rank.
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
      total = fminf(total, FLT_MAX);  // Which is an overflow still.
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

// The ranks' weights with mean 1, by one warp. Where one is no speed all count as equal, and none
// counts as less than kLeastWeight of the largest; both set a status bit.
__device__ __forceinline__ void LoadWeights(const Problem& p, const IpmOptions& options,
                                            const float* weights, const IpmMemory& memory,
                                            float* w) {
  const int32_t lane = threadIdx.x & 31;
  bool good = options.weighted;
  float largest = 0;
#pragma unroll 1
  for (int32_t r = lane; r < p.group_size && good; r += 32) {
    good = IsSpeed(weights[r]);
    largest = fmaxf(largest, weights[r]);
  }
  good = __all_sync(kFullWarp, good);
  bool taken = good;
  float mean = 1;
  float power = 0;
  float least = 1;
  if (good) {
    largest = Team<32>::WarpMax(largest);
    power = PowerOfTwo(-Exponent(largest));  // Their sum could overflow.
    least = kLeastWeight * (largest * power);
    float sum = 0;
#pragma unroll 1
    for (int32_t r = lane; r < p.group_size; r += 32) {
      taken &= weights[r] * power >= least;
      sum += fmaxf(weights[r] * power, least);
    }
    mean = WarpSum(sum) / static_cast<float>(p.group_size);
  }
#pragma unroll 1
  for (int32_t r = lane; r < p.group_size; r += 32) {
    w[r] = memory.weight[r] = good ? fmaxf(weights[r] * power, least) / mean : 1;
  }
  if (options.weighted && !taken) atomicOr(memory.group.status, kNotConverged);
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
    for (int32_t d = 0; d < p.n_columns; ++d) stuck -= CapacityOf<int32_t>(p, memory, 0, r, d);
    alone = max(alone, stuck);
  }
  return max(CeilDivide(WarpSum(total), p.by_group), __reduce_max_sync(kFullWarp, alone));
}

// What cannot leave the best cut, exactly, in tokens; the cut's size.
struct CutTokens {
  int64_t tokens;
  int32_t size;
};

// By one warp.
__device__ __forceinline__ CutTokens TokensOfCut(const Problem& p, const IpmMemory& memory) {
  const GroupMemory& group = memory.group;
  CutTokens value = {0, 0};
#pragma unroll 1
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
    if (!memory.cut[r]) continue;
    value.tokens += group.base[r];
    ++value.size;
#pragma unroll 2
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t edge = r * p.n_columns + d;
      if (!memory.cut[group.dst[edge]]) value.tokens -= group.cap[edge];
    }
  }
  __syncwarp();
  value.tokens = WarpSum(value.tokens);
  value.size = __reduce_add_sync(kFullWarp, value.size);
  return value;
}

// The least load / weight at which the ranks of the cut may have that many tokens, by one warp.
__device__ inline float LeastValue(const Problem& p, const IpmMemory& memory, int64_t tokens) {
  return LeastFloat([&](float value) {
    int64_t allowed = 0;
#pragma unroll 1
    for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
      if (memory.cut[r]) allowed += TokenLimit(value, memory.weight[r]);
    }
    return WarpSum(allowed) >= tokens;
  });
}

// Raises *largest to the ranks' largest value ≥ 0, ints or bits of floats. All threads call it.
__device__ __forceinline__ void NoteLargest(const Problem& p, int32_t value, int32_t* largest) {
  if ((threadIdx.x & ~31) >= p.group_size) return;
  value = __reduce_max_sync(kFullWarp, threadIdx.x < p.group_size ? value : 0);
  if ((threadIdx.x & 31) == 0) atomicMax(largest, value);
}

// Calls function(load) for this lane's part of rank r's experts all of whose slots are in the cut.
template <typename Function>
__device__ __forceinline__ void ForKept(const Problem& p, const IpmMemory& memory, int32_t r,
                                        Function&& function) {
  const float* own = reinterpret_cast<const float*>(memory.group.own) + r * p.n_local;
  if (!memory.cut[r]) return;
#pragma unroll 1
  for (int32_t k = threadIdx.x & 31; k < p.n_local; k += 32) {
    const int32_t edge = r * p.n_columns + p.by_columns.Remainder(k);
    if (k >= p.n_redundant || memory.cut[memory.group.dst[edge]]) function(own[k]);
  }
}

// Real loads, after their quotas are written: the plan's largest load / weight, and what the cut
// proves, in units of a power of two that are never rounded up. Ends with a barrier.
__device__ inline void ProveReal(const Problem& p, const IpmMemory& memory, const float* quota,
                                 Shared& shared) {
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x & 31;
  const int32_t n_warps = blockDim.x / 32;
  if (threadIdx.x == 0) shared.most = 0;
  __syncthreads();
#pragma unroll 1
  for (int32_t r = warp; r < p.group_size; r += n_warps) {
    float load = 0;
    for (int32_t k = lane; k < p.slots_per_rank; k += 32) load += quota[r * p.slots_per_rank + k];
    float kept = 0;
    ForKept(p, memory, r, [&](float value) { kept += value; });
    load = WarpSum(load);
    kept = WarpSum(kept);
    if (lane == 0) {
      atomicMax(&shared.max_load, __float_as_int(load / memory.weight[r]));
      atomicMax(&shared.most, __float_as_int(kept));
    }
  }
  __syncthreads();
  const int32_t exponent = 28 - Exponent(__int_as_float(shared.most));
#pragma unroll 1
  for (int32_t r = warp; r < p.group_size; r += n_warps) {
    int32_t units = 0;
    ForKept(p, memory, r,
            [&](float value) { units += static_cast<int32_t>(ldexpf(value, exponent)); });
    units = __reduce_add_sync(kFullWarp, units);
    if (lane == 0) memory.group.base[r] = units;
  }
  __syncthreads();
  if (warp == 0) {
    int64_t units = 0;
    float weight = 0;
    for (int32_t r = lane; r < p.group_size; r += 32) {
      units += memory.group.base[r];  // 0 outside the cut.
      weight += memory.cut[r] ? memory.weight[r] : 0;
    }
    units = WarpSum(units);
    weight = WarpSum(weight);
    if (lane == 0) {
      const float proven = Provable(static_cast<float>(units), weight, p.group_size);
      shared.bound = ldexpf(proven, -exponent);
    }
  }
  __syncthreads();
}

// What finishes a plan of tokens by waves. On ranks of different speeds loads are counted from what
// the proven load / weight allows every rank, and the target is 0. All threads call it; ends with a
// barrier.
__device__ __forceinline__ void Repair(const Problem& p, const IpmOptions& options,
                                       const IpmMemory& memory, Shared& shared) {
  const GroupMemory& group = memory.group;
  const int32_t rank = threadIdx.x;
  const auto count_from = [&](int32_t sign) {
    if (rank < p.group_size) {
      memory.load[rank] += sign * TokenLimit(shared.bound, memory.weight[rank]);
    }
    __syncthreads();
  };
  const BlockGraph graph = {p.group_size, p.n_columns, group.src,
                            group.dst,    group.cap,   group.moved,
                            memory.load,  group.level, reinterpret_cast<uint32_t*>(group.sums)};
  if (!options.weighted) {
    const int32_t target = BlockWaves<Block>(graph, shared.target);
    if (rank == 0) shared.target = target;
    __syncthreads();
    return;
  }
  count_from(-1);
  BlockWaves<Block>(graph, 0, [&](bool kept, int32_t, int32_t) {
    count_from(1);
    if (rank < p.group_size) memory.cut[rank] = kept;
    __syncthreads();
    if (rank < 32) {
      int64_t tokens = 0;
      for (int32_t r = rank; r < p.group_size; r += 32)
        tokens += memory.cut[r] ? memory.load[r] : 0;
      const float value = LeastValue(p, memory, WarpSum(tokens));
      if (rank == 0) shared.bound = value;
    }
    __syncthreads();
    count_from(-1);
    return 0;
  });
  count_from(1);
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
  if (rank < p.group_size) {
    load = group.base[rank];
#pragma unroll 2
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t to = rank * p.n_columns + d;
      const int32_t from = group.src[to] * p.n_columns + d;
      load += RoundTokens(memory.flow[from], group.cap[from]) -
              RoundTokens(memory.flow[to], group.cap[to]);
    }
    memory.load[rank] = load;
  }
  if (threadIdx.x / 32 == blockDim.x / 32 - 1) {
    const CutTokens cut = TokensOfCut(p, memory);
    if (options.weighted) {
      const float value = LeastValue(p, memory, cut.tokens);
      if ((threadIdx.x & 31) == 0) shared.bound = value;
    } else if ((threadIdx.x & 31) == 0 && cut.tokens > 0) {
      shared.target = max(shared.target, CeilDivide(cut.tokens, SmallDivisor(cut.size)));
    }
  }
  if (options.repair) {
    __syncthreads();
    Repair(p, options, memory, shared);
    if (!options.weighted) {
      if (rank == 0) shared.max_load = shared.target;
      __syncthreads();
      return;
    }
    load = rank < p.group_size ? memory.load[rank] : 0;
  }
  if (options.weighted && rank < p.group_size) {
    load = __float_as_int(static_cast<float>(load) / memory.weight[rank]);
  }
  NoteLargest(p, load, &shared.max_load);
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

// The whole group, of loads of type Load, as one block sees it.
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
  Load* quota;  // Of the group's first slot.

  // The topology, the weights and the loads of all ranks. Ends with a barrier.
  __device__ __forceinline__ void LoadGroup() const {
    const Ahead ahead = AheadOf<Block>(p, in.solve, groups);  // Arrives behind the barrier.
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
      LoadWeights(p, options, in.weights, memory, solver.w);
      for (int32_t i = n_edges + lane; i < PaddedEdges(n_edges); i += 32) {
        memory.ends[i] = make_float4(0, 0, 0, 0);
      }
      CheckInvalid(lane);
    }
    if constexpr (kFloats) {
      LoadRealRanks(p, in.solve, groups, ahead, sources, memory.group, solver.base);
    } else {
      LoadRanks<Block>(p, in.solve, groups, ahead, LoadedTotals{in.solve.loads, sources},
                       memory.group);
    }
    __syncthreads();
  }

  // Ids that named no expert, which rows may count in their last place; by one warp.
  __device__ __forceinline__ void CheckInvalid(int32_t lane) const {
    if (sources.row <= p.n_logical) return;
#pragma unroll 1
    for (int32_t s = lane; s < sources.n_sources; s += 32) {
      const int64_t last = static_cast<int64_t>(s) * sources.row + p.n_logical;
      if (reinterpret_cast<const Load*>(in.solve.loads)[last] != 0) {
        atomicOr(memory.group.status, kInvalidIndex);
      }
    }
  }

  // What needs no plan; threads first, first + stride, … take part.
  __device__ __forceinline__ void DoTheRest(int32_t first, int32_t stride) const {
    if (!kFloats && first < 32) {
      const int32_t target = FirstTarget(p, memory.group);
      if (first == 0) shared.target = target;
    }
    CheckCopies(p, in.solve, groups, memory.group, first, stride);
    CheckOwnSlots(p, in.solve, groups, memory.group, false, first, stride);
    WriteFixedQuotas(p, groups, memory.group, reinterpret_cast<int32_t*>(quota), first, stride);
  }

  // The edges' capacities, and whether some rank could receive too much; by the team, every thread
  // of which gets the answer.
  __device__ __forceinline__ bool Bound() const {
    const GroupMemory& group = memory.group;
    for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += Solver::kThreads) {
      const int32_t rank = p.by_columns.Quotient(i);
      const Load cap = CapacityOf<Load>(p, group, 0, rank, i - rank * p.n_columns);
      if constexpr (!kFloats) group.cap[i] = cap;
      memory.cap[i] = static_cast<float>(cap);
    }
    TeamOf::Sync();
    // A plan's rank loads never pass this sum, so where it fits nothing overflows.
    bool overflow = false;
    if (threadIdx.x < p.group_size) {
      using Sum = std::conditional_t<kFloats, float, uint32_t>;
      Sum most = kFloats ? static_cast<Sum>(solver.base[threadIdx.x])
                         : static_cast<Sum>(group.base[threadIdx.x]);  // −1 has overflowed before.
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

  // The interior point's plan and cut, by the team.
  __device__ __forceinline__ void Solve() const {
    float back = 1;
    if constexpr (kFloats) {
      // A power of two first, since the sum of all ranks' loads could overflow.
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

  // Nothing moves and nothing is proven. Ends with a barrier.
  __device__ __forceinline__ void GiveUp() const {
    for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += blockDim.x) {
      memory.group.moved[i] = 0;
      memory.flow[i] = 0;
    }
    if (threadIdx.x == 0) {
      shared.max_load = kFloats            ? kInfinity
                        : options.weighted ? __float_as_int(static_cast<float>(kInt32Max))
                                           : kInt32Max;
      shared.target = 0;
      shared.bound = 0;
    }
    __syncthreads();
  }

  // The quotas of the replicated experts.
  __device__ __forceinline__ void WriteSplit(const Load* moved) const {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.group_size * p.n_redundant; i += blockDim.x) {
      FinishCopy(PrepareCopy<Load>(p, memory.group, i), moved, quota);
    }
  }

  // By one thread.
  __device__ __forceinline__ void WriteProof(const SolveResults& out) const {
    int32_t lower_bound = shared.target;
    bool converged = Converged(shared.max_load, shared.target);
    if (options.float_loads_out()) {
      const float max_load = __int_as_float(shared.max_load);
      const float bound = fminf(shared.bound, max_load);
      lower_bound = __float_as_int(bound);
      converged = Converged(max_load, bound);
    }
    int32_t status = *memory.group.status;
    if (shared.overflow) {
      status |= kLoadOverflow;
    } else if (!converged) {
      status |= kNotConverged;
    }
    out.max_load[groups.first] = shared.max_load;
    out.lower_bound[groups.first] = lower_bound;
    out.status[groups.first] = status;
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
  // Warps that do not solve do what needs no plan. If all solve, all do that first.
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
  if (thread == 0) block.WriteProof(out);
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
