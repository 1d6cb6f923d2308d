// From the interior point's plan and cut to a result: what is proven, and whole tokens.
#ifndef LPLB_CUDA_IPM_PROVE_CUH_
#define LPLB_CUDA_IPM_PROVE_CUH_

#include "cuda/ipm/load.cuh"

namespace lplb::cuda {

// Sum over the warp of values of magnitude below 2⁴⁷.
__device__ __forceinline__ int64_t WarpSum(int64_t value) {
  const int32_t high = __reduce_add_sync(kFullWarp, static_cast<int32_t>(value >> 16));
  const uint32_t low = __reduce_add_sync(kFullWarp, static_cast<uint32_t>(value) & 0xffff);
  return (static_cast<int64_t>(high) << 16) + low;
}

// ⌈sum / n⌉ for sum ≥ 0. The result must fit in int32.
template <typename Number>
__device__ __forceinline__ int32_t CeilDivide(int64_t sum, const Number& n) {
  return CeilDivide(static_cast<uint32_t>(sum >> 16), static_cast<uint32_t>(sum) & 0xffff, n);
}

// The lower bound from the set of all ranks and from all single ranks, by one warp.
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

// The exact number of tokens that cannot leave the best cut, and the cut's size.
struct CutTokens {
  int64_t tokens;
  int32_t size;
};

// Computed by one warp.
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

// The least load / weight at which the ranks r with has(r) can hold `tokens` tokens, by one warp.
template <typename Has>
__device__ __forceinline__ float LeastValue(int32_t n_ranks, const float* weight, int64_t tokens,
                                            Has&& has) {
  return LeastFloat([&](float value) {
    int64_t allowed = 0;
#pragma unroll 1
    for (int32_t r = threadIdx.x & 31; r < n_ranks; r += 32) {
      if (has(r)) allowed += TokenLimit(value, weight[r]);
    }
    return WarpSum(allowed) >= tokens;
  });
}

// The same for the best cut.
__device__ inline float LeastValue(const Problem& p, const IpmMemory& memory, int64_t tokens) {
  return LeastValue(p.group_size, memory.weight, tokens,
                    [&](int32_t r) { return memory.cut[r] != 0; });
}

// Raises *largest to the largest value of any rank. Values are ≥ 0: ints or bits of floats. All
// threads call it.
__device__ __forceinline__ void NoteLargest(int32_t n_ranks, int32_t value, int32_t* largest) {
  if ((threadIdx.x & ~31) >= n_ranks) return;
  value = __reduce_max_sync(kFullWarp, threadIdx.x < n_ranks ? value : 0);
  if ((threadIdx.x & 31) == 0) atomicMax(largest, value);
}

// What is reported if nothing is divided and nothing proven, by one thread.
template <bool kFloats>
__device__ __forceinline__ void NoProof(const IpmOptions& options, Shared& shared) {
  shared.max_load = kFloats            ? kInfinity
                    : options.weighted ? __float_as_int(static_cast<float>(kInt32Max))
                                       : kInt32Max;
  shared.target = 0;
  shared.bound = 0;
}

// Writes the group's results besides the quotas, by one thread.
__device__ __forceinline__ void WriteProof(const IpmOptions& options, const Shared& shared,
                                           int32_t status, int32_t group, const SolveResults& out) {
  int32_t lower_bound = shared.target;
  bool converged = Converged(shared.max_load, shared.target);
  if (options.float_loads_out()) {
    const float max_load = __int_as_float(shared.max_load);
    const float bound = fminf(shared.bound, max_load);
    lower_bound = __float_as_int(bound);
    converged = Converged(max_load, bound);
  }
  if (shared.overflow) {
    status |= kLoadOverflow;
  } else if (!converged) {
    status |= kNotConverged;
  }
  out.max_load[group] = shared.max_load;
  out.lower_bound[group] = lower_bound;
  out.status[group] = status;
}

// Calls function(load) for this lane's share of the experts of rank r whose slots are all in the
// cut.
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

// For real loads, once their quotas are written: finds the plan's largest load / weight and what
// the cut proves. The proof counts in units of a power of two, never rounded up. Ends with a
// barrier.
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

// Finishes a plan of whole tokens by waves. On ranks of different speeds, loads are counted
// relative to what the proven load / weight allows each rank, and the target is 0. All threads call
// it. Ends with a barrier.
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

// Finishes a solve in whole tokens: rounds the plan, proves a bound, and repairs. Ends with a
// barrier.
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
  NoteLargest(p.group_size, load, &shared.max_load);
  __syncthreads();
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_PROVE_CUH_
