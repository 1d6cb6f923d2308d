// The waves of the exact solver, started from a legal plan that is almost optimal already. Written
// to be short: after the interior point few tokens are left to move.
#ifndef LPLB_CUDA_REPAIR_CUH_
#define LPLB_CUDA_REPAIR_CUH_

#include <cstdint>

#include "cuda/interior.cuh"

namespace lplb::cuda {

struct RepairMemory {
  const int32_t* cap;  // [n_ranks, n_columns]
  int32_t* moved;      // Likewise.
  int32_t* load;       // [n_ranks]
  int32_t* level;      // [n_ranks]
  unsigned long long* excess;
  int32_t* unseen;
};

// Moves tokens until no rank is above the target, which must be proven, or has been raised to what
// is. All threads of the block call it, at least one per rank, and get the target. Ends with a
// barrier.
__device__ inline int32_t Repair(const Graph& graph, const RepairMemory& memory, int32_t target) {
  const int32_t rank = threadIdx.x;
  const bool live = rank < graph.n_ranks;
  const int32_t first = rank * graph.n_columns;
  const int32_t n_columns = live ? graph.n_columns : 0;
  while (true) {
    const int32_t load = live ? memory.load[rank] : 0;
    const bool above = live && load > target;
    int32_t level = live && load < target ? 0 : -1;
    if (live) memory.level[rank] = level;
    if (threadIdx.x == 0) {
      *memory.excess = 0;
      *memory.unseen = 0;
    }
    if (!__syncthreads_or(above)) return target;

    // Breadth first from the ranks below the target.
    int32_t depth = 0;
    bool reached = true;
    while (__syncthreads_or(above && level < 0)) {
      bool hit = false;
#pragma unroll 1
      for (int32_t d = 0; level < 0 && d < n_columns && !hit; ++d) {
        const int32_t from = graph.src[first + d];
        const int32_t to = graph.dst[first + d];
        hit = (memory.moved[first + d] < memory.cap[first + d] && memory.level[to] == depth) ||
              (memory.moved[from * graph.n_columns + d] > 0 && memory.level[from] == depth);
      }
      reached = __syncthreads_or(hit);
      if (!reached) break;
      ++depth;
      if (hit) memory.level[rank] = level = depth;
    }
    if (!reached) {
      // Nothing more can leave the unseen ranks: their mean load is a new lower bound.
      if (live && level < 0) {
        atomicAdd(memory.excess, static_cast<unsigned long long>(static_cast<int64_t>(load) -
                                                                 static_cast<int64_t>(target)));
        atomicAdd(memory.unseen, 1);
      }
      __syncthreads();
      const int64_t excess = static_cast<int64_t>(*memory.excess);
      target += static_cast<int32_t>((excess + *memory.unseen - 1) / *memory.unseen);
      __syncthreads();
      continue;
    }

    for (int32_t l = depth; l > 0; --l) {
      if (level == l) {
        // Only level l − 1 receives now, and every edge has one rank of level l at most.
        int32_t excess = max(memory.load[rank] - target, 0);
#pragma unroll 1
        for (int32_t d = 0; d < n_columns && excess > 0; ++d) {
          const int32_t to = graph.dst[first + d];
          if (memory.level[to] == l - 1) {
            const int32_t sent = min(excess, memory.cap[first + d] - memory.moved[first + d]);
            memory.moved[first + d] += sent;
            memory.load[rank] -= sent;
            atomicAdd(&memory.load[to], sent);
            excess -= sent;
          }
          const int32_t from = graph.src[first + d];
          if (memory.level[from] == l - 1) {
            int32_t& entered = memory.moved[from * graph.n_columns + d];
            const int32_t returned = min(excess, entered);
            entered -= returned;
            memory.load[rank] -= returned;
            atomicAdd(&memory.load[from], returned);
            excess -= returned;
          }
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_REPAIR_CUH_
