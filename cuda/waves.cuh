// The waves of the exact solver for one group: lplb_jax/reference/solver.py says what they do.
//
// Edge (u, d) leads from rank u to dst[u, d], the rank that holds copies of u's column d; src is
// its inverse, r2o. Both versions below do the same integer arithmetic in the same order.
#ifndef LPLB_CUDA_WAVES_CUH_
#define LPLB_CUDA_WAVES_CUH_

#include <cstdint>

namespace lplb::cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;

// ⌈sum / n⌉ of values ≥ 0 given as sums of their high and low 16 bits: the sum may pass 2³¹, the
// quotient may not.
__device__ __forceinline__ int32_t CeilDivide(uint32_t high, uint32_t low, uint32_t n) {
  const uint32_t quotient = high / n;
  return (quotient << 16) + (((high - quotient * n) << 16) + low + n - 1) / n;
}

// ⌈sum of the warp's values / n⌉.
__device__ __forceinline__ int32_t WarpCeilMean(int32_t value, uint32_t n) {
  const uint32_t bits = static_cast<uint32_t>(value);
  return CeilDivide(__reduce_add_sync(kFullWarp, bits >> 16),
                    __reduce_add_sync(kFullWarp, bits & 0xffff), n);
}

// Groups of at most 32 ranks, in the registers of one warp: lane r is rank r. All 32 lanes call it;
// idle lanes bring load 0, capacities 0 and themselves as src and dst.
// In and out: load. Out: moved, the tokens moved along this lane's edges. Returns the target.
template <int kColumns>
__device__ int32_t WarpWaves(int32_t n_ranks, const int32_t (&src)[kColumns],
                             const int32_t (&dst)[kColumns], const int32_t (&cap)[kColumns],
                             int32_t& load, int32_t (&moved)[kColumns]) {
  const int32_t lane = threadIdx.x & 31;
  const uint32_t idle = n_ranks == 32 ? 0 : kFullWarp << n_ranks;
  int32_t entered[kColumns];  // moved[d] of src[d]: what my redundant columns hold.
  int32_t stuck = load;
#pragma unroll
  for (int d = 0; d < kColumns; ++d) {
    moved[d] = entered[d] = 0;
    stuck -= cap[d];
  }
  int32_t target = max(WarpCeilMean(load, n_ranks), __reduce_max_sync(kFullWarp, stuck));

  while (const uint32_t above = __ballot_sync(kFullWarp, load > target)) {
    uint32_t neighbours = 0;  // Where a token could go from here.
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      if (moved[d] < cap[d]) neighbours |= 1u << dst[d];
      if (entered[d] > 0) neighbours |= 1u << src[d];
    }

    // Breadth first from the ranks below the target; idle lanes, whose load is 0, do not count.
    uint32_t frontier = __ballot_sync(kFullWarp, load < target) & ~idle;
    uint32_t seen = frontier | idle;
    uint32_t admissible = 0;
    int32_t level = (seen >> lane) & 1 ? 0 : -1;
    int32_t depth = 0;
    while (above & ~seen) {
      const bool hit = level < 0 && (neighbours & frontier);
      const uint32_t found = __ballot_sync(kFullWarp, hit);
      if (found == 0) break;
      ++depth;
      if (hit) {
        level = depth;
        admissible = frontier;
      }
      frontier = found;
      seen |= found;
    }

    if (above & ~seen) {  // Nothing can leave the unseen ranks: raise the target to their mean.
      const bool unseen = !((seen >> lane) & 1);
      target += WarpCeilMean(unseen ? load - target : 0, __popc(~seen));
      continue;
    }

    for (int32_t l = depth; l > 0; --l) {
      int32_t excess = level == l ? max(load - target, 0) : 0;
      int32_t sent[kColumns];
      int32_t returned[kColumns];
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        sent[d] = (admissible >> dst[d]) & 1 ? min(excess, cap[d] - moved[d]) : 0;
        excess -= sent[d];
        returned[d] = (admissible >> src[d]) & 1 ? min(excess, entered[d]) : 0;
        excess -= returned[d];
      }
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        const int32_t received = __shfl_sync(kFullWarp, sent[d], src[d]);
        const int32_t got_back = __shfl_sync(kFullWarp, returned[d], dst[d]);
        moved[d] += sent[d] - got_back;
        entered[d] += received - returned[d];
        load += received + got_back - sent[d] - returned[d];
      }
    }
  }
  return target;
}

// The buffers of BlockWaves in shared memory; edges are rank-major, [n_ranks, n_columns].
struct BlockGraph {
  int32_t n_ranks;
  int32_t n_columns;
  const int32_t* src;
  const int32_t* dst;
  const int32_t* cap;
  int32_t* moved;
  int32_t* load;
  int32_t* level;
  uint32_t* sums;  // [3]
};

// ⌈sum of value over the chosen threads / their number⌉; all threads of the block call it.
__device__ inline int32_t BlockCeilMean(bool chosen, int32_t value, uint32_t* sums) {
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  __syncthreads();
  if (chosen) {
    const uint32_t bits = static_cast<uint32_t>(value);
    atomicAdd(&sums[0], bits >> 16);
    atomicAdd(&sums[1], bits & 0xffff);
    atomicAdd(&sums[2], 1u);
  }
  __syncthreads();
  const int32_t mean = CeilDivide(sums[0], sums[1], sums[2]);
  __syncthreads();  // The sums may be used again.
  return mean;
}

// Groups of any shape up to one rank per thread, in shared memory. All threads of the block call it
// and agree on the target that it returns; moved must be 0.
__device__ inline int32_t BlockWaves(const BlockGraph& graph) {
  const int32_t rank = threadIdx.x;
  const bool live = rank < graph.n_ranks;
  const int32_t first = rank * graph.n_columns;
  const int32_t n_columns = live ? graph.n_columns : 0;

  int32_t stuck = live ? graph.load[rank] : 0;
  for (int32_t d = 0; d < n_columns; ++d) stuck -= graph.cap[first + d];
  int32_t target = BlockCeilMean(live, live ? graph.load[rank] : 0, graph.sums);
  if (threadIdx.x == 0) graph.sums[0] = 0;
  __syncthreads();
  if (stuck > target) atomicMax(&graph.sums[0], static_cast<uint32_t>(stuck));
  __syncthreads();
  target = max(target, static_cast<int32_t>(graph.sums[0]));

  while (true) {
    const int32_t load = live ? graph.load[rank] : 0;
    const bool above = load > target;
    int32_t level = live && load < target ? 0 : -1;
    if (live) graph.level[rank] = level;
    if (!__syncthreads_or(above)) return target;

    int32_t depth = 0;
    bool reached = true;
    while (__syncthreads_or(above && level < 0)) {
      bool hit = false;
      if (level < 0) {
        for (int32_t d = 0; d < n_columns && !hit; ++d) {
          const int32_t from = graph.src[first + d];
          const int32_t to = graph.dst[first + d];
          hit = (graph.moved[first + d] < graph.cap[first + d] && graph.level[to] == depth) ||
                (graph.moved[from * graph.n_columns + d] > 0 && graph.level[from] == depth);
        }
      }
      reached = __syncthreads_or(hit);
      if (!reached) break;
      ++depth;
      // Others only look for level depth − 1 until the next barrier.
      if (hit) graph.level[rank] = level = depth;
    }
    if (!reached) {
      target += BlockCeilMean(live && level < 0, load - target, graph.sums);
      continue;
    }

    for (int32_t l = depth; l > 0; --l) {
      if (level == l) {
        // Only level l − 1 receives now, and every edge has one rank of level l at most.
        int32_t excess = max(graph.load[rank] - target, 0);
        for (int32_t d = 0; d < n_columns && excess > 0; ++d) {
          const int32_t to = graph.dst[first + d];
          if (graph.level[to] == l - 1) {
            const int32_t sent = min(excess, graph.cap[first + d] - graph.moved[first + d]);
            graph.moved[first + d] += sent;
            graph.load[rank] -= sent;
            atomicAdd(&graph.load[to], sent);
            excess -= sent;
          }
          const int32_t from = graph.src[first + d];
          if (graph.level[from] == l - 1) {
            int32_t& entered = graph.moved[from * graph.n_columns + d];
            const int32_t returned = min(excess, entered);
            entered -= returned;
            graph.load[rank] -= returned;
            atomicAdd(&graph.load[from], returned);
            excess -= returned;
          }
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_WAVES_CUH_
