// The waves of the exact solver for one group: lplb_jax/reference/solver.py says what they do.
//
// Edge (u, d) leads from rank u to dst[u, d], the rank that holds copies of u's column d; src is
// its inverse, r2o. Both versions below do the same integer arithmetic in the same order.
#ifndef LPLB_CUDA_WAVES_CUH_
#define LPLB_CUDA_WAVES_CUH_

#include <cstdint>

#include "cuda/problem.h"
#include "cuda/team.cuh"
#include "cuda/warp.cuh"

namespace lplb::cuda {

// Division of dividends up to 2²⁴, with quotients below 2²², by a number that only the device
// knows. An inverse that is rounded correctly would be a function call, after which the compiler no
// longer knows that the lanes of a warp are together: the waves that follow would take 10 % longer.
struct SmallDivisor {
  int32_t divisor;
  float inverse;

  __device__ explicit SmallDivisor(int32_t d) : divisor(d) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(d)));
  }

  __device__ __forceinline__ int32_t Quotient(int32_t dividend) const {
    const int32_t quotient = static_cast<int32_t>(static_cast<float>(dividend) * inverse);
    // Off by one at most: relative errors are 2⁻²³ of the inverse and 2⁻²⁴ of the product.
    const int32_t rest = dividend - quotient * divisor;
    return quotient + (rest >= divisor) - (rest < 0);
  }
};

// ⌈sum / n⌉ of at most 128 values ≥ 0 given as sums of their high and low 16 bits: the sum may pass
// 2³¹, the quotient may not. Divided as by hand, since 64 bits would cost several times as much.
template <typename Number>
__device__ __forceinline__ int32_t CeilDivide(uint32_t high, uint32_t low, const Number& n) {
  const int32_t leading = static_cast<int32_t>(high + (low >> 16));  // Below 2²³.
  const int32_t first = n.Quotient(leading);
  const int32_t rest =
      (leading - first * n.divisor) << 16 | static_cast<int32_t>(low & 0xffff);  // Likewise.
  const int32_t second = n.Quotient(rest);
  return (first << 16) + second + (rest - second * n.divisor > 0);
}

// No problem takes nearly as many phases. Where an r2o is no topology tokens get lost, and this
// ends the waves, which nothing else might.
constexpr int32_t kMostPhases = 1 << 20;

// One bit or one value per rank of a group whose rank r is lane r % 32 of word r / 32.
template <int kWords>
struct RankSet {
  uint32_t word[kWords];

  __device__ __forceinline__ bool Has(int32_t rank) const {
    // The compiler would choose a word by branches, or by its index in local memory.
    if constexpr (kWords == 2) return (word[0] | uint64_t{word[1]} << 32) >> rank & 1;
    uint32_t bits = word[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) bits = rank >> 5 == w ? word[w] : bits;
    return (bits >> (rank & 31)) & 1;
  }
};

template <typename Value, int kWords>
__device__ __forceinline__ Value ValueOf(const Value (&value)[kWords], int32_t rank) {
  Value found = __shfl_sync(kFullWarp, value[0], rank & 31);
#pragma unroll
  for (int w = 1; w < kWords; ++w) {
    const Value other = __shfl_sync(kFullWarp, value[w], rank & 31);
    found = rank >> 5 == w ? other : found;
  }
  return found;
}

// ⌈sum of the warp's values / n⌉.
template <int kWords, typename Number>
__device__ __forceinline__ int32_t WarpCeilMean(const int32_t (&value)[kWords], const Number& n) {
  uint32_t high = 0;
  uint32_t low = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    high += static_cast<uint32_t>(value[w]) >> 16;
    low += static_cast<uint32_t>(value[w]) & 0xffff;
  }
  return CeilDivide(__reduce_add_sync(kFullWarp, high), __reduce_add_sync(kFullWarp, low), n);
}

// A lane's part of a group: word w of lane l is rank 32 w + l. Idle places have load and capacities
// 0 and themselves as src and dst. Nothing has moved until WarpWaves is called.
template <int kWords, int kColumns>
struct WarpGraph {
  int32_t src[kColumns][kWords];
  int32_t dst[kColumns][kWords];
  int32_t cap[kColumns][kWords];
  int32_t moved[kColumns][kWords] = {};
  int32_t load[kWords];
};

// What is proven of loads that no plan has changed yet: the bounds of the set of all ranks and of
// the sets of one.
template <int kWords, int kColumns>
__device__ __forceinline__ int32_t WarpFirstTarget(const Divisor& n_ranks,
                                                   const WarpGraph<kWords, kColumns>& graph) {
  int32_t stuck = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    int32_t cannot_leave = graph.load[w];
#pragma unroll
    for (int d = 0; d < kColumns; ++d) cannot_leave -= graph.cap[d][w];
    stuck = max(stuck, cannot_leave);
  }
  return max(WarpCeilMean(graph.load, n_ranks), __reduce_max_sync(kFullWarp, stuck));
}

// Groups of at most 32 · kWords ranks, in the registers of one warp; all its lanes call it. Adds to
// moved, which must be 0, balances load, and returns the target, raised to what is proven, which
// then no load is above.
template <int kWords, int kColumns>
__device__ __forceinline__ int32_t WarpWaves(int32_t n_ranks, int32_t target,
                                             WarpGraph<kWords, kColumns>& graph) {
  const int32_t lane = threadIdx.x & 31;
  auto& [src, dst, cap, moved, load] = graph;
  int32_t entered[kColumns][kWords];  // What my redundant columns hold: moved of src.
  uint32_t idle[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t left = n_ranks - 32 * w;
    idle[w] = left >= 32 ? 0 : left <= 0 ? kFullWarp : kFullWarp << left;
#pragma unroll
    for (int d = 0; d < kColumns; ++d) entered[d][w] = 0;
  }

#pragma unroll 1
  for (int32_t phase = 0;; ++phase) {
    RankSet<kWords> above;
    uint32_t any_above = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      above.word[w] = __ballot_sync(kFullWarp, load[w] > target);
      any_above |= above.word[w];
    }
    if (any_above == 0 || phase == kMostPhases) return target;

    // Breadth first from the ranks below the target, until all above have a level or nothing new
    // has. Idle places, whose load is 0, count as seen.
    RankSet<kWords> frontier;
    uint32_t seen[kWords];
    int32_t level[kWords];
    uint32_t waiting = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      frontier.word[w] = __ballot_sync(kFullWarp, load[w] < target) & ~idle[w];
      seen[w] = frontier.word[w] | idle[w];
      level[w] = (seen[w] >> lane) & 1 ? 0 : -1;
      waiting |= above.word[w] & ~seen[w];
    }
    RankSet<kWords> reachable[kWords];  // Where a token could go from here.
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
#pragma unroll
      for (int v = 0; v < kWords; ++v) {
        uint32_t bits = 0;
#pragma unroll
        for (int d = 0; d < kColumns; ++d) {
          const int32_t to = dst[d][w];
          const int32_t from = src[d][w];
          if (moved[d][w] < cap[d][w] && to >> 5 == v) bits |= 1u << (to & 31);
          if (entered[d][w] > 0 && from >> 5 == v) bits |= 1u << (from & 31);
        }
        reachable[w].word[v] = bits;
      }
    }
    RankSet<kWords> below[kWords] = {};  // The level that this place pushes to.
    int32_t depth = 0;
    while (waiting) {
      RankSet<kWords> found;
      bool hit[kWords];
      uint32_t any_found = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        uint32_t met = 0;
#pragma unroll
        for (int v = 0; v < kWords; ++v) met |= reachable[w].word[v] & frontier.word[v];
        hit[w] = level[w] < 0 && met;
        found.word[w] = __ballot_sync(kFullWarp, hit[w]);
        any_found |= found.word[w];
      }
      if (any_found == 0) break;
      ++depth;
      waiting = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if (hit[w]) {
          level[w] = depth;
          below[w] = frontier;
        }
        seen[w] |= found.word[w];
        waiting |= above.word[w] & ~seen[w];
      }
      frontier = found;
    }

    if (waiting) {  // Nothing can leave the unseen ranks: raise the target to their mean.
      int32_t excess[kWords];
      int32_t n_unseen = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        excess[w] = (seen[w] >> lane) & 1 ? 0 : load[w] - target;
        n_unseen += __popc(~seen[w]);
      }
      target += WarpCeilMean(excess, SmallDivisor(n_unseen));
      continue;
    }

    // From here on the levels matter only as masks: what an edge may carry one level down.
    int32_t can_send[kColumns][kWords];
    int32_t can_return[kColumns][kWords];
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        can_send[d][w] = below[w].Has(dst[d][w]) ? -1 : 0;
        can_return[d][w] = below[w].Has(src[d][w]) ? -1 : 0;
      }
    }
#pragma unroll 1
    for (int32_t l = depth; l > 0; --l) {
      int32_t excess[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) excess[w] = level[w] == l ? max(load[w] - target, 0) : 0;
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        int32_t sent[kWords];
        int32_t returned[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          sent[w] = min(excess[w], (cap[d][w] - moved[d][w]) & can_send[d][w]);
          excess[w] -= sent[w];
          returned[w] = min(excess[w], entered[d][w] & can_return[d][w]);
          excess[w] -= returned[w];
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          // Nobody of level l receives, so pushing column by column changes no excess.
          const int32_t received = ValueOf(sent, src[d][w]);
          const int32_t got_back = ValueOf(returned, dst[d][w]);
          moved[d][w] += sent[w] - got_back;
          entered[d][w] += received - returned[w];
          load[w] += received + got_back - sent[w] - returned[w];
        }
      }
    }
  }
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

// ⌈sum of value over the chosen threads / their number⌉; all of the team call it.
template <typename Threads>
__device__ inline int32_t BlockCeilMean(bool chosen, int32_t value, uint32_t* sums) {
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  Threads::Sync();
  if (chosen) {
    const uint32_t bits = static_cast<uint32_t>(value);
    atomicAdd(&sums[0], bits >> 16);
    atomicAdd(&sums[1], bits & 0xffff);
    atomicAdd(&sums[2], 1u);
  }
  Threads::Sync();
  const int32_t mean = CeilDivide(sums[0], sums[1], SmallDivisor(static_cast<int32_t>(sums[2])));
  Threads::Sync();  // The sums may be used again.
  return mean;
}

// What is proven of loads that no plan has changed yet: the bounds of the set of all ranks and of
// the sets of one. All threads of the team call it.
template <typename Threads>
__device__ inline int32_t BlockFirstTarget(const BlockGraph& graph) {
  const int32_t rank = threadIdx.x;
  const bool live = rank < graph.n_ranks;
  const int32_t first = rank * graph.n_columns;
  const int32_t n_columns = live ? graph.n_columns : 0;

  int32_t stuck = live ? graph.load[rank] : 0;
  for (int32_t d = 0; d < n_columns; ++d) stuck -= graph.cap[first + d];
  const int32_t mean = BlockCeilMean<Threads>(live, live ? graph.load[rank] : 0, graph.sums);
  if (threadIdx.x == 0) graph.sums[0] = 0;
  Threads::Sync();
  if (stuck > mean) atomicMax(&graph.sums[0], static_cast<uint32_t>(stuck));
  Threads::Sync();
  return max(mean, static_cast<int32_t>(graph.sums[0]));
}

// Groups of any shape up to one rank per thread, in shared memory, from any legal plan: load must
// be what `moved` makes of it, and the target proven. All threads of the team call it and agree on
// the target that it returns, which no load is above then. Ends with a barrier. All threads call
// `raise(kept, load, target)` too, for the next target; kept: nothing more can leave this thread's
// rank and the others like it. It may also change loads that are counted from one of each rank's
// own.
template <typename Threads, typename Raise>
__device__ inline int32_t BlockWaves(const BlockGraph& graph, int32_t target, const Raise& raise) {
  const int32_t rank = threadIdx.x;
  const bool live = rank < graph.n_ranks;
  const int32_t first = rank * graph.n_columns;
  const int32_t n_columns = live ? graph.n_columns : 0;

  for (int32_t phase = 0;; ++phase) {
    const int32_t load = live ? graph.load[rank] : 0;
    const bool above = live && load > target;
    int32_t level = live && load < target ? 0 : -1;
    if (live) graph.level[rank] = level;
    if (!Threads::Any(above) || phase == kMostPhases) return target;

    int32_t depth = 0;
    bool reached = true;
    while (Threads::Any(above && level < 0)) {
      bool hit = false;
      if (level < 0) {
        for (int32_t d = 0; d < n_columns && !hit; ++d) {
          const int32_t from = graph.src[first + d];
          const int32_t to = graph.dst[first + d];
          hit = (graph.moved[first + d] < graph.cap[first + d] && graph.level[to] == depth) ||
                (graph.moved[from * graph.n_columns + d] > 0 && graph.level[from] == depth);
        }
      }
      reached = Threads::Any(hit);
      if (!reached) break;
      ++depth;
      // Others only look for level depth − 1 until the next barrier.
      if (hit) graph.level[rank] = level = depth;
    }
    if (!reached) {
      target = raise(live && level < 0, load, target);
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
      Threads::Sync();
    }
  }
}

// Likewise, where the target is the kept ranks' mean load.
template <typename Threads>
__device__ inline int32_t BlockWaves(const BlockGraph& graph, int32_t target) {
  return BlockWaves<Threads>(graph, target, [&](bool kept, int32_t load, int32_t target) {
    return target + BlockCeilMean<Threads>(kept, load - target, graph.sums);
  });
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_WAVES_CUH_
