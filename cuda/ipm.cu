#include <algorithm>
#include <type_traits>

#include "cuda/interior.cuh"
#include "cuda/ipm.h"
#include "cuda/repair.cuh"

namespace lplb::cuda {
namespace {

// What a group needs in shared memory besides the interior point's own.
struct GroupMemory {
  float4* ends;            // [n_edges], see Interior
  float *cap, *flow, *H;   // [n_edges]
  int32_t *src, *dst;      // [n_edges]
  int32_t *units, *moved;  // [n_edges], capacities and plan in tokens, or in units for the proof
  int32_t *base, *level;   // [n_ranks]
  int32_t* cut;            // [n_ranks]
  float* weight;           // [n_ranks]
  int32_t* own;            // [n_ranks, n_local], words as in loads

  static __host__ __device__ int64_t Bytes(const Problem& p) {
    const int64_t edges = static_cast<int64_t>(p.group_size) * p.n_columns;
    return edges * (16 + 7 * 4) + p.group_size * 4 * (4 + static_cast<int64_t>(p.n_local()));
  }

  __device__ GroupMemory(const Problem& p, char* memory) {
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
    weight = reinterpret_cast<float*>(cut + p.group_size);
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
};

__device__ __forceinline__ float WarpSum(float value) {
  float values[1] = {value};
  Team<32>::SumUp<0>(values);
  return values[0];
}

__device__ __forceinline__ int64_t WarpSum(int64_t value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Loads one rank with one warp; returns the status bits that a lane has seen. The rank's sum goes
// to `base`, where it fits.
template <typename Load>
__device__ int32_t LoadRank(const Problem& p, const Sources& sources, const SolveOperands& in,
                            int32_t group, int32_t rank, const GroupMemory& memory, float* base) {
  constexpr bool kFloats = std::is_same_v<Load, float>;
  using Sum = std::conditional_t<kFloats, float, int64_t>;
  const int32_t n_local = p.n_local();
  const int32_t slots = p.slots_per_rank();
  const int32_t first_rank = group * p.group_size;
  const int32_t first_slot = (first_rank + rank) * slots;
  const Load* loads = reinterpret_cast<const Load*>(in.loads);
  int32_t status = 0;
  Sum sum = 0;
  for (int32_t k = threadIdx.x & 31; k < slots; k += 32) {
    const int32_t expert = in.phy2log[first_slot + k];
    const int32_t known = min(max(expert, 0), p.n_logical - 1);
    const bool copy = k >= n_local;
    if (expert != known || in.log2phy[known * p.max_replicas + copy] != first_slot + k) {
      status |= kBadPlacement;
    }
    if (copy) {
      const int32_t source = in.r2o[rank * p.n_columns + (k - n_local) % p.n_columns];
      if (expert != in.phy2log[(first_rank + source) * slots + k - n_local]) {
        status |= kBadPlacement;
      }
      continue;
    }
    Sum total = 0;
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
    reinterpret_cast<Load*>(memory.own)[rank * n_local + k] = static_cast<Load>(total);
    sum += total;
  }
  sum = WarpSum(sum);
  if constexpr (!kFloats) {
    if (sum > kInt32Max) status |= kLoadOverflow;
    if ((threadIdx.x & 31) == 0) memory.base[rank] = static_cast<int32_t>(sum);
  }
  if ((threadIdx.x & 31) == 0) base[rank] = static_cast<float>(sum);
  return status;
}

// What an edge could move: the sum over its owner's replicated experts in this column.
template <typename Sum, typename Function>
__device__ __forceinline__ Sum OverColumn(const Problem& p, const GroupMemory& memory, int32_t edge,
                                          Function&& load) {
  const int32_t rank = edge / p.n_columns;
  Sum sum = 0;
  if (memory.dst[edge] == rank) return sum;
  for (int32_t k = edge % p.n_columns; k < p.n_redundant(); k += p.n_columns) {
    sum += load(rank * p.n_local() + k);
  }
  return sum;
}

// Writes the quotas of one rank's experts, with one warp: an edge's tokens come from its experts in
// order.
template <typename Load>
__device__ void WriteQuotas(const Problem& p, const SolveResults& out, int32_t group, int32_t rank,
                            const GroupMemory& memory, const Load* moved) {
  const int32_t n_local = p.n_local();
  const int32_t slots = p.slots_per_rank();
  const Load* own = reinterpret_cast<const Load*>(memory.own) + rank * n_local;
  Load* quota =
      reinterpret_cast<Load*>(out.quota) + static_cast<int64_t>(group) * p.group_size * slots;
  for (int32_t k = threadIdx.x & 31; k < n_local; k += 32) {
    const Load load = own[k];
    Load away = 0;
    if (k < p.n_redundant()) {
      const int32_t edge = rank * p.n_columns + k % p.n_columns;
      Load left = moved[edge];
      for (int32_t j = k % p.n_columns; j < k && left > 0; j += p.n_columns) {
        left -= min(left, own[j]);
      }
      away = min(left, load);
      quota[memory.dst[edge] * slots + n_local + k] = away;
    }
    quota[rank * slots + k] = load - away;
  }
}

// The exact value of the best cut, its weight and size, and the bounds of all ranks and of single
// ones; by one warp, over the loads and capacities in tokens or units.
struct Proof {
  int64_t stuck;
  float weight;
  int32_t size;
  int32_t first_target;
};

__device__ Proof Prove(const Problem& p, const GroupMemory& memory) {
  Proof proof = {0, 0, 0, 0};
  int64_t total = 0;
  int64_t alone = 0;
  for (int32_t r = threadIdx.x & 31; r < p.group_size; r += 32) {
    const int64_t base = memory.base[r];
    int64_t stays = base;
    int64_t stuck = base;
    for (int32_t d = 0; d < p.n_columns; ++d) {
      const int32_t edge = r * p.n_columns + d;
      stuck -= memory.units[edge];
      if (!memory.cut[memory.dst[edge]]) stays -= memory.units[edge];
    }
    total += base;
    alone = max(alone, stuck);
    if (memory.cut[r]) {
      proof.stuck += stays;
      proof.weight += memory.weight[r];
      ++proof.size;
    }
  }
  proof.stuck = WarpSum(proof.stuck);
  proof.weight = WarpSum(proof.weight);
  proof.size = __reduce_add_sync(kAllLanes, proof.size);
  total = WarpSum(total);
  const int32_t mean = static_cast<int32_t>((total + p.group_size - 1) / p.group_size);
  proof.first_target = max(mean, __reduce_max_sync(kAllLanes, static_cast<int32_t>(alone)));
  return proof;
}

// Solves one group with one block.
template <int kRanks, int kParts, int kEdges, typename Load>
__global__ void __launch_bounds__(kRanks* kParts > 256 ? kRanks * kParts : 256)
    IpmKernel(Problem p, Sources sources, IpmOptions options, IpmOperands first_in,
              SolveResults first_out) {
  using Solver = Interior<kRanks, kParts, kEdges>;
  constexpr bool kFloats = std::is_same_v<Load, float>;
  extern __shared__ __align__(16) char dynamic[];
  __shared__ __align__(16) typename Solver::Memory solver_memory;
  __shared__ Shared shared;
  const int32_t group = blockIdx.x % p.n_groups();
  const int64_t element = blockIdx.x / p.n_groups();
  const IpmOperands operands = BatchElement(p, sources, first_in, element);
  const SolveOperands& in = operands.solve;
  const SolveResults out = BatchElement(p, first_out, element);
  const GroupMemory memory(p, dynamic);
  const int32_t warp = threadIdx.x / 32;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t n_edges = p.group_size * p.n_columns;
  const Graph graph = {p.group_size, p.n_columns, memory.src, memory.dst};
  const Load* own = reinterpret_cast<const Load*>(memory.own);

  int32_t status = 0;
  for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
    const int32_t source = in.r2o[i];
    memory.src[i] = source;
    memory.dst[source * p.n_columns + i % p.n_columns] = i / p.n_columns;
  }
  for (int32_t r = threadIdx.x; r < kRanks; r += blockDim.x) {
    const bool live = r < p.group_size;
    const float weight = live && options.weighted ? operands.weights[r] : 1;
    if (!(weight > 0 && weight <= 3e38f)) status |= kNotConverged;
    if (live) memory.weight[r] = weight;
    solver_memory.base[r] = 0;
    solver_memory.w[r] = 0;
    solver_memory.y[r] = 0;
    solver_memory.ex[r] = 1;
    solver_memory.q[r] = 0;
  }
  if (threadIdx.x == 0) shared.most = 0;
  __syncthreads();

  for (int32_t r = warp; r < p.group_size; r += n_warps) {
    status |= LoadRank<Load>(p, sources, in, group, r, memory, solver_memory.base);
  }
  if (warp == 0) {
    float sum = 0;
    for (int32_t r = threadIdx.x; r < p.group_size; r += 32) sum += memory.weight[r];
    sum = WarpSum(sum);
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
    if (threadIdx.x == 0) {
      shared.max_load = kInt32Max;
      shared.largest = kFloats ? __int_as_float(0x7f800000) : static_cast<float>(kInt32Max);
      shared.target = 0;
      shared.proven = 0;
    }
    __syncthreads();
  } else {
    if (threadIdx.x < Solver::kThreads) {
      Solver solver(graph, solver_memory, {memory.cap, memory.flow, memory.H, memory.ends});
      const auto result = solver.Run();
      if (threadIdx.x < p.group_size) memory.cut[threadIdx.x] = result.in_cut;
      if (threadIdx.x == 0) {
        shared.largest = result.largest;
        shared.bound = result.bound;
      }
    }
    __syncthreads();

    int32_t exponent = 0;
    if constexpr (kFloats) {
      // For the proof, loads in units of a power of two that are rounded the safe way; and the
      // largest load of the plan.
      const float most = __int_as_float(shared.most);
      exponent = UnitExponent(most);
      for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
        memory.units[i] = OverColumn<int32_t>(p, memory, i, [&](int32_t k) {
          return static_cast<int32_t>(ceilf(ldexpf(own[k], exponent)));
        });
      }
      for (int32_t r = warp; r < p.group_size; r += n_warps) {
        int64_t units = 0;
        float load = 0;
        for (int32_t k = threadIdx.x & 31; k < p.n_local(); k += 32) {
          const float value = own[r * p.n_local() + k];
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
          memory.level[r] = __float_as_int(fmaxf(load, 0) / memory.weight[r]);
        }
      }
    } else {
      for (int32_t i = threadIdx.x; i < n_edges; i += blockDim.x) {
        memory.moved[i] = RoundTokens(memory.flow[i], memory.units[i]);
      }
    }
    __syncthreads();

    if (warp == 0) {
      const Proof proof = Prove(p, memory);
      int32_t target = proof.first_target;
      if (proof.stuck > 0) {
        const int64_t share = (proof.stuck + proof.size - 1) / proof.size;
        target = max(target, static_cast<int32_t>(share));
      }
      const float proven = Provable(proof.stuck, -exponent, proof.weight, p.group_size);
      int32_t largest = 0;
      if constexpr (kFloats) {
        for (int32_t r = threadIdx.x; r < p.group_size; r += 32) {
          largest = max(largest, memory.level[r]);
        }
        largest = __reduce_max_sync(kAllLanes, largest);
      }
      if (threadIdx.x == 0) {
        shared.target = target;
        shared.proven = proven;
        if (kFloats) {
          shared.largest = __int_as_float(largest);
          shared.bound = proven;
        }
      }
    }
    __syncthreads();
    bool converged = shared.largest - shared.bound <= kConvergedGap * shared.largest;

    if constexpr (!kFloats) {
      int32_t enough = 0;
      if (threadIdx.x < p.group_size) {
        const int32_t r = threadIdx.x;
        // Where the plan at hand is best ⌈t·w_r⌉ tokens are enough for every rank r.
        if (options.weighted) enough = EnoughTokens(shared.largest, memory.weight[r]);
        int32_t load = memory.base[r] - enough;
        for (int32_t d = 0; d < p.n_columns; ++d) {
          const int32_t edge = r * p.n_columns + d;
          load += memory.moved[memory.src[edge] * p.n_columns + d] - memory.moved[edge];
        }
        memory.base[r] = load;
      }
      int32_t target = options.weighted ? 0 : shared.target;
      __syncthreads();
      if (options.repair) {
        target = Repair(
            graph,
            {memory.units, memory.moved, memory.base, memory.level, &shared.excess, &shared.unseen},
            target);
        converged |= !options.weighted;
      }
      if (threadIdx.x < p.group_size) {
        const int32_t load = memory.base[threadIdx.x] + enough;
        memory.level[threadIdx.x] =
            options.weighted ? __float_as_int(static_cast<float>(load) / memory.weight[threadIdx.x])
                             : load;
      }
      __syncthreads();
      if (warp == 0) {
        int32_t most = 0;
        for (int32_t r = threadIdx.x; r < p.group_size; r += 32) most = max(most, memory.level[r]);
        most = __reduce_max_sync(kAllLanes, most);
        if (threadIdx.x == 0) {
          shared.max_load = most;
          if (options.weighted) shared.largest = __int_as_float(most);
          shared.target = target;
        }
      }
    }
    if (!converged) status |= kNotConverged;
    __syncthreads();
  }

  for (int32_t r = warp; r < p.group_size; r += n_warps) {
    if constexpr (kFloats) {
      if (overflow) {
        WriteQuotas<float>(p, out, group, r, memory, reinterpret_cast<const float*>(memory.moved));
      } else {
        WriteQuotas<float>(p, out, group, r, memory, memory.flow);
      }
    } else {
      WriteQuotas<int32_t>(p, out, group, r, memory, memory.moved);
    }
  }
  // One vote per bit: every thread has seen its own part.
  int32_t all = 0;
  for (int32_t bit = 1; bit <= kNotConverged; bit *= 2) {
    if (__syncthreads_or(status & bit)) all |= bit;
  }
  if (threadIdx.x == 0) {
    if (options.float_loads_out()) {
      out.max_load[group] = __float_as_int(shared.largest);
      out.lower_bound[group] = __float_as_int(fminf(shared.proven, shared.largest));
    } else {
      out.max_load[group] = shared.max_load;
      out.lower_bound[group] = shared.target;
    }
    out.status[group] = all;
  }
}

constexpr int32_t kMaxGroupSize = 128;
constexpr int64_t kMaxSharedBytes = 160 << 10;  // Every supported chip has a little more.
constexpr int32_t kMostEdges = 16;              // Of one thread.

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

Choice Choose(const Problem& p, const IpmOptions& options, int variant) {
  if (p.group_size <= 8) return WithEdges<8, 1>(p, options);
  if (p.group_size <= 16) return WithEdges<16, 2>(p, options);
  if (p.group_size <= 32) return WithEdges<32, 4>(p, options);
  if (p.group_size <= 64) return WithEdges<64, 4>(p, options);
  return WithEdges<128, 4>(p, options);
}

}  // namespace

bool IpmFitsOneBlock(const Problem& problem) {
  if (problem.group_size > kMaxGroupSize) return false;
  const Choice choice = Choose(problem, {}, 0);
  return choice.kernel != nullptr &&
         GroupMemory::Bytes(problem) + choice.bytes + 1024 <= kMaxSharedBytes;
}

cudaError_t LaunchIpm(const Problem& problem, const Sources& sources, const IpmOptions& options,
                      int64_t batch, const IpmOperands& in, const SolveResults& out, int variant,
                      cudaStream_t stream) {
  const int64_t blocks = batch * problem.n_groups();
  if (blocks == 0) return cudaSuccess;
  const Choice choice = Choose(problem, options, variant);
  const int64_t bytes = GroupMemory::Bytes(problem);
  if (bytes + choice.bytes > (48 << 10)) {
    const cudaError_t error = cudaFuncSetAttribute(
        choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  const int32_t threads = std::max(choice.threads, std::clamp(32 * problem.group_size, 128, 256));
  choice.kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(problem, sources,
                                                                           options, in, out);
  return cudaGetLastError();
}

}  // namespace lplb::cuda
