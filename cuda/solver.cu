#include <algorithm>

#include "cuda/solver.h"
#include "cuda/waves.cuh"

namespace lplb::cuda {
namespace {

// Shared memory of one group, in int32 words: own loads, base loads, and the replica graph.
struct GroupMemory {
  int32_t* own;    // [n_ranks, n_local], tokens of every rank's own experts
  int32_t* base;   // [n_ranks], their sums; then the loads as they are balanced
  int32_t* src;    // [n_ranks, n_columns], r2o
  int32_t* dst;    // [n_ranks, n_columns], its inverse
  int32_t* cap;    // [n_ranks, n_columns], tokens that could move
  int32_t* moved;  // [n_ranks, n_columns], tokens that do
  int32_t* level;  // [n_ranks]
  int32_t* sums;   // [3]

  static int64_t Words(const Problem& p) {
    return static_cast<int64_t>(p.group_size) * (p.n_local() + 2 + 4 * p.n_columns) + 3;
  }

  __device__ GroupMemory(const Problem& p, int32_t* memory) {
    const int32_t edges = p.group_size * p.n_columns;
    own = memory;
    base = own + p.group_size * p.n_local();
    src = base + p.group_size;
    dst = src + edges;
    cap = dst + edges;
    moved = cap + edges;
    level = moved + edges;
    sums = level + p.group_size;
  }
};

// Loads one rank with one warp; returns the status bits that a lane has seen.
__device__ int32_t LoadRank(const Problem& p, const Sources& sources, const SolveOperands& in,
                            int32_t group, int32_t rank, const GroupMemory& memory) {
  const int32_t lane = threadIdx.x & 31;
  const int32_t n_local = p.n_local();
  const int32_t slots = p.slots_per_rank();
  const int32_t first_rank = group * p.group_size;
  const int32_t first_slot = (first_rank + rank) * slots;
  int32_t status = 0;
  uint32_t high = 0;
  uint32_t low = 0;
  for (int32_t k = lane; k < slots; k += 32) {
    const int32_t expert = in.phy2log[first_slot + k];
    const int32_t known = min(max(expert, 0), p.n_logical - 1);
    const bool copy = k >= n_local;
    if (expert != known || in.log2phy[known * p.max_replicas + copy] != first_slot + k) {
      status |= kBadPlacement;
    }
    if (copy) {
      const int32_t source = memory.src[rank * p.n_columns + (k - n_local) % p.n_columns];
      if (expert != in.phy2log[(first_rank + source) * slots + k - n_local]) {
        status |= kBadPlacement;
      }
      continue;
    }
    int64_t total = 0;
    for (int32_t s = 0; s < sources.n_sources; ++s) {
      const int32_t load = in.loads[static_cast<int64_t>(s) * sources.row + known];
      if (load < 0) status |= kNegativeLoad;
      total += max(load, 0);
    }
    if (total > kInt32Max) status |= kLoadOverflow;
    const uint32_t tokens = static_cast<uint32_t>(min(total, static_cast<int64_t>(kInt32Max)));
    memory.own[rank * n_local + k] = static_cast<int32_t>(tokens);
    high += tokens >> 16;
    low += tokens & 0xffff;
  }
  high = __reduce_add_sync(kFullWarp, high);
  low = __reduce_add_sync(kFullWarp, low);
  if (high + (low >> 16) >= 1u << 15) status |= kLoadOverflow;
  if (lane == 0) memory.base[rank] = static_cast<int32_t>((high << 16) + low);
  return status;
}

// What an edge could move: the tokens of its owner's replicated experts in this column.
__device__ int32_t CapacityOf(const Problem& p, const GroupMemory& memory, int32_t rank,
                              int32_t column) {
  if (memory.dst[rank * p.n_columns + column] == rank) return 0;
  uint32_t tokens = 0;  // Wraps only where the rank's load has overflowed too.
  for (int32_t k = column; k < p.n_redundant(); k += p.n_columns) {
    tokens += static_cast<uint32_t>(memory.own[rank * p.n_local() + k]);
  }
  return static_cast<int32_t>(tokens);
}

// Writes the quotas of one rank's experts, with one warp: an edge's tokens come from its experts in
// order.
__device__ void WriteQuotas(const Problem& p, const SolveResults& out, int32_t group, int32_t rank,
                            const GroupMemory& memory) {
  const int32_t n_local = p.n_local();
  const int32_t slots = p.slots_per_rank();
  int32_t* quota = out.quota + static_cast<int64_t>(group) * p.group_size * slots;
  for (int32_t k = threadIdx.x & 31; k < n_local; k += 32) {
    const int32_t tokens = memory.own[rank * n_local + k];
    int32_t away = 0;
    if (k < p.n_redundant()) {
      const int32_t edge = rank * p.n_columns + k % p.n_columns;
      int32_t left = memory.moved[edge];
      for (int32_t j = k % p.n_columns; j < k && left > 0; j += p.n_columns) {
        left -= min(left, memory.own[rank * n_local + j]);
      }
      away = min(left, tokens);
      quota[memory.dst[edge] * slots + n_local + k] = away;
    }
    quota[rank * slots + k] = tokens - away;
  }
}

// Solves one group with one block: the first warp in registers where kColumns > 0, else the block.
template <int kColumns>
__global__ void SolveKernel(Problem p, Sources sources, SolveOperands first_in,
                            SolveResults first_out) {
  extern __shared__ int32_t shared[];
  const int32_t group = blockIdx.x % p.n_groups();
  const int64_t element = blockIdx.x / p.n_groups();
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const SolveResults out = BatchElement(p, first_out, element);
  const GroupMemory memory(p, shared);
  const int32_t n_warps = blockDim.x / 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t edges = p.group_size * p.n_columns;

  for (int32_t i = threadIdx.x; i < edges; i += blockDim.x) {
    const int32_t source = in.r2o[i];
    memory.src[i] = source;
    memory.dst[source * p.n_columns + i % p.n_columns] = i / p.n_columns;
    memory.moved[i] = 0;
  }
  __syncthreads();

  int32_t status = 0;
  for (int32_t r = warp; r < p.group_size; r += n_warps) {
    status |= LoadRank(p, sources, in, group, r, memory);
  }
  if (sources.row > p.n_logical) {
    for (int32_t s = threadIdx.x; s < sources.n_sources; s += blockDim.x) {
      if (in.loads[static_cast<int64_t>(s) * sources.row + p.n_logical] != 0) {
        status |= kInvalidIndex;
      }
    }
  }
  __syncthreads();

  for (int32_t i = threadIdx.x; i < edges; i += blockDim.x) {
    memory.cap[i] = CapacityOf(p, memory, i / p.n_columns, i % p.n_columns);
  }
  __syncthreads();
  // A plan's rank loads never pass this sum, so where it fits nothing in the waves overflows.
  for (int32_t r = threadIdx.x; r < p.group_size; r += blockDim.x) {
    int64_t most = memory.base[r];
    for (int32_t d = 0; d < p.n_columns; ++d) {
      most += memory.cap[memory.src[r * p.n_columns + d] * p.n_columns + d];
    }
    if (most > kInt32Max) status |= kLoadOverflow;
  }
  const bool overflow = __syncthreads_or(status & kLoadOverflow);

  int32_t max_load = kInt32Max;
  int32_t target = 0;
  if (overflow) {
    // Nothing moves and nothing is proven.
  } else if constexpr (kColumns > 0) {
    if (warp == 0) {
      const bool live = threadIdx.x < p.group_size;
      int32_t src[kColumns], dst[kColumns], cap[kColumns], moved[kColumns];
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        const int32_t edge = threadIdx.x * kColumns + d;
        src[d] = live ? memory.src[edge] : threadIdx.x;
        dst[d] = live ? memory.dst[edge] : threadIdx.x;
        cap[d] = live ? memory.cap[edge] : 0;
      }
      int32_t load = live ? memory.base[threadIdx.x] : 0;
      target = WarpWaves<kColumns>(p.group_size, src, dst, cap, load, moved);
      max_load = __reduce_max_sync(kFullWarp, load);
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        if (live) memory.moved[threadIdx.x * kColumns + d] = moved[d];
      }
    }
  } else {
    target =
        BlockWaves({p.group_size, p.n_columns, memory.src, memory.dst, memory.cap, memory.moved,
                    memory.base, memory.level, reinterpret_cast<uint32_t*>(memory.sums)});
    max_load = 0;
    for (int32_t r = 0; r < p.group_size; ++r) max_load = max(max_load, memory.base[r]);
  }
  __syncthreads();

  for (int32_t r = warp; r < p.group_size; r += n_warps) {
    WriteQuotas(p, out, group, r, memory);
  }
  // One vote per bit: every thread has seen its own part.
  int32_t all = 0;
  for (int32_t bit = 1; bit <= kBadPlacement; bit *= 2) {
    if (__syncthreads_or(status & bit)) all |= bit;
  }
  if (threadIdx.x == 0) {
    out.max_load[group] = max_load;
    out.lower_bound[group] = target;
    out.status[group] = all;
  }
}

constexpr int64_t kDefaultSharedBytes = 48 << 10;
constexpr int64_t kMaxSharedBytes = 96 << 10;  // Every supported chip has more.

using Kernel = void (*)(Problem, Sources, SolveOperands, SolveResults);

Kernel ChooseKernel(const Problem& problem) {
  if (problem.group_size > 32) return SolveKernel<0>;
  switch (problem.n_columns) {
    case 1:
      return SolveKernel<1>;
    case 2:
      return SolveKernel<2>;
    case 3:
      return SolveKernel<3>;
    case 4:
      return SolveKernel<4>;
    default:
      return SolveKernel<0>;
  }
}

}  // namespace

bool FitsOneBlock(const Problem& problem) {
  return problem.group_size <= kMaxGroupSize &&
         GroupMemory::Words(problem) * static_cast<int64_t>(sizeof(int32_t)) <= kMaxSharedBytes;
}

cudaError_t LaunchSolve(const Problem& problem, const Sources& sources, int64_t batch,
                        const SolveOperands& in, const SolveResults& out, cudaStream_t stream) {
  const int64_t blocks = batch * problem.n_groups();
  if (blocks == 0) return cudaSuccess;
  const Kernel kernel = ChooseKernel(problem);
  const int64_t bytes = GroupMemory::Words(problem) * static_cast<int64_t>(sizeof(int32_t));
  if (bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  // A warp loads a rank, and BlockWaves wants a thread per rank.
  const int32_t threads = std::clamp(32 * problem.group_size, 128, 512);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(problem, sources, in, out);
  return cudaGetLastError();
}

}  // namespace lplb::cuda
