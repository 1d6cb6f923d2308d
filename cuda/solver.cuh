// Solves groups with one team of threads, as device functions that the kernels compose:
// LoadTopology and PrefetchSlot; barrier; LoadRanks; barrier; SolveGroups. Threads is the team:
// Block, or a Team.
#ifndef LPLB_CUDA_SOLVER_CUH_
#define LPLB_CUDA_SOLVER_CUH_

#include "cuda/problem.h"
#include "cuda/waves.cuh"

namespace lplb::cuda {

// The groups that one block solves: n consecutive ones.
struct Groups {
  int32_t first;
  int32_t n;
};

// Shared memory of those groups, in int32 words. Ranks are numbered through all groups of the
// block.
struct GroupMemory {
  int32_t* own;     // [n_ranks, n_local], tokens of every rank's own experts
  int32_t* base;    // [n_ranks], their sums; BlockWaves turns them into balanced loads
  int32_t* moved;   // [n_ranks, n_columns], tokens that move along every edge
  int32_t* src;     // [group_size, n_columns], r2o
  int32_t* dst;     // [group_size, n_columns], its inverse
  int32_t* cap;     // [group_size, n_columns], for BlockWaves
  int32_t* level;   // [group_size], for BlockWaves
  int32_t* sums;    // [3], for BlockWaves
  int32_t* status;  // [n_groups], set to 0 before LoadRanks

  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_groups) {
    return n_groups * (p.group_size * (p.n_local + 1 + p.n_columns) + 1) +
           p.group_size * (3 * p.n_columns + 1) + 3;
  }

  __device__ GroupMemory(const Problem& p, int32_t n_groups, int32_t* memory) {
    const int32_t n_ranks = n_groups * p.group_size;
    const int32_t edges = p.group_size * p.n_columns;
    own = memory;
    base = own + n_ranks * p.n_local;
    moved = base + n_ranks;
    src = moved + n_ranks * p.n_columns;
    dst = src + edges;
    cap = dst + edges;
    level = cap + edges;
    sums = level + p.group_size;
    status = sums + 3;
  }
};

// Sums an expert's tokens over all sources, of which the first has `load`, and collects their
// status bits.
__device__ __forceinline__ int2 SumSources(const int32_t* loads, const Sources& sources,
                                           int32_t expert, int32_t load) {
  int32_t lowest = load;
  int64_t total = max(load, 0);
#pragma unroll 4
  for (int32_t s = 1; s < sources.n_sources; ++s) {
    load = loads[s * sources.row + expert];
    lowest = min(lowest, load);
    total += max(load, 0);
  }
  int32_t status = lowest < 0 ? kNegativeLoad : 0;
  if (total > kInt32Max) status |= kLoadOverflow;
  return {static_cast<int32_t>(min(total, static_cast<int64_t>(kInt32Max))), status};
}

__device__ __forceinline__ int2 SumSources(const int32_t* loads, const Sources& sources,
                                           int32_t expert) {
  return SumSources(loads, sources, expert, loads[expert]);
}

// Totals of all experts in shared memory, from SumSources or from this kernel's counts. −1 where
// they exceeded int32.
struct SummedTotals {
  const int2* total;

  __device__ __forceinline__ int2 operator[](int32_t expert) const { return total[expert]; }
};

struct CountedTotals {
  const int32_t* total;

  __device__ __forceinline__ int2 operator[](int32_t expert) const {
    const int32_t count = total[expert];
    return count >= 0 ? int2{count, 0} : int2{kInt32Max, kLoadOverflow};
  }
};

// A tile of threads handles one rank's experts and slots. Its width is a power of two that fits, at
// most a warp, so that small ranks share a warp.
struct Tile {
  int32_t width;
  int32_t lane;   // of this thread, in its tile
  int32_t index;  // of this tile, in the team
  int32_t n;      // tiles in the team

  __device__ Tile(const Problem& p, int32_t n_threads) {
    width = 1 << p.tile_log2;
    lane = threadIdx.x & (width - 1);
    index = threadIdx.x >> p.tile_log2;
    n = n_threads >> p.tile_log2;
  }
};

// Keeps addresses in range whatever phy2log holds.
__device__ __forceinline__ int32_t KnownExpert(const Problem& p, int32_t expert) {
  return min(max(expert, 0), p.n_logical - 1);
}

// Sum over this thread's tile.
__device__ __forceinline__ uint32_t TileSum(const Problem& p, uint32_t value) {
  if (p.tile_log2 == 5) return __reduce_add_sync(kFullWarp, value);
#pragma unroll
  for (int32_t step = 8; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, value, step);
    if (step < 1 << p.tile_log2) value += other;
  }
  return value;
}

// Stores edge i of r2o in both directions. Addresses stay in range whatever r2o holds. If a column
// is not a permutation, parts of `dst` stay unset. The waves then move meaningless tokens, but they
// terminate, and CheckCopies finds that the placement does not follow r2o.
__device__ __forceinline__ void StoreEdge(const Problem& p, const GroupMemory& memory, int32_t i,
                                          int32_t source) {
  const int32_t rank = p.by_columns.Quotient(i);
  source = min(max(source, 0), p.group_size - 1);
  memory.src[i] = source;
  memory.dst[source * p.n_columns + i - rank * p.n_columns] = rank;
}

// Stores the topology in the solver's layout. Does not depend on loads; no barrier follows. Threads
// first, first + stride, … take part.
__device__ __forceinline__ void LoadTopology(const Problem& p, const int32_t* r2o,
                                             const GroupMemory& memory, int32_t first,
                                             int32_t stride) {
#pragma unroll 1
  for (int32_t i = first; i < p.group_size * p.n_columns; i += stride) {
    StoreEdge(p, memory, i, r2o[i]);
  }
}

// The first own slot that this thread will load, fetched before the totals are ready.
struct PrefetchedSlot {
  int32_t slot;    // −1 if it loads none
  int32_t expert;  // in the slot
  int32_t home;    // the expert's first slot, which should be this one
  int32_t copy;    // its second slot; −1 if it should have none
};

template <typename Threads>
__device__ __forceinline__ PrefetchedSlot PrefetchSlot(const Problem& p, const SolveOperands& in,
                                                       Groups groups) {
  const Tile tile(p, Threads::Size());
  if (tile.index >= groups.n * p.group_size || tile.lane >= p.n_local) return {-1, 0, -1, -1};
  const int32_t rank = groups.first * p.group_size + tile.index;
  const int32_t slot = rank * p.slots_per_rank + tile.lane;
  return {slot, in.phy2log[slot], -1, -1};
}

// `fetched.expert` must have arrived by now.
__device__ __forceinline__ void FetchHome(const Problem& p, const SolveOperands& in,
                                          PrefetchedSlot& fetched) {
  if (fetched.slot < 0) return;
  const int32_t* named = in.log2phy + KnownExpert(p, fetched.expert) * p.max_replicas;
  fetched.home = named[0];
  fetched.copy = named[1];
}

// Loads the tokens of all ranks' own experts. `fetched` is from PrefetchSlot. A rank whose sum
// exceeds int32, or that has an expert whose total does, gets base −1.
template <typename Threads, typename Totals>
__device__ __forceinline__ void LoadRanks(const Problem& p, const SolveOperands& in, Groups groups,
                                          const PrefetchedSlot& fetched, const Totals& totals,
                                          const GroupMemory& memory) {
  const Tile tile(p, Threads::Size());
  const int32_t n_ranks = groups.n * p.group_size;
  const int32_t first_slot = groups.first * p.group_size * p.slots_per_rank;
  // The tiles of a warp must stay together for the shuffles, so their first rank decides when they
  // leave.
  const int32_t first_of_warp = (threadIdx.x & ~31) >> p.tile_log2;
  int32_t rank = tile.index;
  // Often this is the only one.
  int2 total = totals[KnownExpert(p, fetched.expert)];
  if (fetched.slot < 0) total = {0, 0};
  if (fetched.slot >= 0) memory.own[rank * p.n_local + tile.lane] = total.x;
#pragma unroll 1
  for (int32_t left = n_ranks - first_of_warp; left > 0; left -= tile.n, rank += tile.n) {
    const int32_t end = rank < n_ranks ? p.n_local : 0;
    const int32_t* slots = in.phy2log + first_slot + rank * p.slots_per_rank;
    int32_t k = tile.lane + tile.width;
    if (rank != tile.index) {
      total = {0, 0};
      k = tile.lane;
    }
    uint32_t sum = total.x;
    int32_t largest = total.x;
    int32_t status = total.y;
#pragma unroll 1
    for (; k < end; k += tile.width) {
      total = totals[KnownExpert(p, slots[k])];
      memory.own[rank * p.n_local + k] = total.x;
      sum += static_cast<uint32_t>(total.x);
      largest = max(largest, total.x);
      status |= total.y;
    }
    sum = TileSum(p, sum);
    if (!__all_sync(kFullWarp, largest <= p.safe_load && status == 0)) {
      // The sum may have wrapped, so add the high halves separately. The low halves add up to less
      // than 2³¹. If the high halves, in their place, do too, `sum` has not wrapped and shows
      // whether the total exceeds 2³¹ − 1.
      uint32_t high = 0;
#pragma unroll 1
      for (k = tile.lane; k < end; k += tile.width) {
        high += static_cast<uint32_t>(memory.own[rank * p.n_local + k]) >> 16;
      }
      if (status & kLoadOverflow) high = 1u << 15;
      if (TileSum(p, high) >= 1u << 15 || sum > static_cast<uint32_t>(kInt32Max)) {
        status |= kLoadOverflow;
        sum = ~0u;
      }
      if (status != 0 && rank < n_ranks) {
        atomicOr(&memory.status[p.by_group.Quotient(rank)], status);
      }
    }
    if (tile.lane == 0 && rank < n_ranks) memory.base[rank] = static_cast<int32_t>(sum);
  }
}

// Writes the quotas that no plan changes: for experts without a copy.
// Threads first, first + stride, … take the ranks' experts.
__device__ __forceinline__ void WriteFixedQuotas(const Problem& p, Groups groups,
                                                 const GroupMemory& memory, int32_t* quota,
                                                 int32_t first, int32_t stride) {
  const int32_t n_fixed = p.n_local - p.n_redundant;
#pragma unroll 1
  for (int32_t i = first; i < groups.n * p.group_size * n_fixed; i += stride) {
    const int32_t rank = p.by_fixed.Quotient(i);
    const int32_t k = p.n_redundant + i - rank * n_fixed;
    quota[rank * p.slots_per_rank + k] = memory.own[rank * p.n_local + k];
  }
}

// Adds an expert's load to the sum over others in its column. It saturates at 2³¹ − 1. Beyond that
// the rank's load has overflowed too, and no plan moves anything.
__device__ __forceinline__ int32_t AddLoad(int32_t sum, int32_t load) {
  return static_cast<int32_t>(min(static_cast<uint32_t>(sum) + static_cast<uint32_t>(load),
                                  static_cast<uint32_t>(kInt32Max)));
}
__device__ __forceinline__ float AddLoad(float sum, float load) { return sum + load; }

// What FinishCopy needs of a replicated expert, known before the plan. Load is int32_t, or float if
// memory.own holds floats.
template <typename Load>
struct Copy {
  int32_t edge;  // along which it may move
  Load before;   // the edge's earlier experts, which move first
  Load load;
  int32_t own_slot;  // relative to the block's first
  int32_t copy_slot;
};

// Prepares replicated expert number i of the block's groups.
template <typename Load>
__device__ __forceinline__ Copy<Load> PrepareCopy(const Problem& p, const GroupMemory& memory,
                                                  int32_t i) {
  const int32_t rank = p.by_redundant.Quotient(i);
  const int32_t k = i - rank * p.n_redundant;
  const int32_t column = p.by_columns.Remainder(k);
  const int32_t group = p.by_group.Quotient(rank);
  const int32_t in_group = rank - group * p.group_size;
  const int32_t found = memory.dst[in_group * p.n_columns + column];  // See StoreEdge.
  const int32_t holder = group * p.group_size + min(max(found, 0), p.group_size - 1);
  const Load* own = reinterpret_cast<const Load*>(memory.own) + rank * p.n_local;
  Load before = 0;
#pragma unroll 1
  for (int32_t j = column; j < k; j += p.n_columns) before = AddLoad(before, own[j]);
  Copy<Load> copy;
  copy.edge = rank * p.n_columns + column;
  copy.before = before;
  copy.load = own[k];
  copy.own_slot = rank * p.slots_per_rank + k;
  copy.copy_slot = holder * p.slots_per_rank + p.n_local + k;
  return copy;
}

// Whether every own slot of the block is in some thread's PrefetchedSlot.
template <typename Threads>
__device__ __forceinline__ bool AllPrefetched(const Problem& p, Groups groups) {
  const Tile tile(p, Threads::Size());
  return tile.n >= groups.n * p.group_size && tile.width >= p.n_local;
}

// Checks the own slots that this thread takes: each must be the first one of its expert, and
// log2phy must name no slots besides an expert's own and copy. Leaves to CheckPrefetched what that
// covers. On an error, sets the group's status and returns false. Threads first, first + stride, …
// take the slots.
__device__ __forceinline__ bool CheckOwnSlots(const Problem& p, const SolveOperands& in,
                                              Groups groups, const GroupMemory& memory,
                                              bool all_prefetched, int32_t first, int32_t stride) {
  const int32_t n_ranks = groups.n * p.group_size;
  // Often nothing is left to check. Then skip a global load, which takes longer than a short solve.
  if (all_prefetched && p.max_replicas == 2) return true;
  bool all_right = true;
  const int32_t first_slot = groups.first * p.group_size * p.slots_per_rank;
#pragma unroll 1
  for (int32_t i = first; i < n_ranks * p.slots_per_rank; i += stride) {
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t k = i - rank * p.slots_per_rank;
    const int32_t n_named = k < p.n_redundant ? 2 : 1;
    if (k >= p.n_local) continue;
    const int32_t expert = in.phy2log[first_slot + i];
    const int32_t known = KnownExpert(p, expert);
    const int32_t* named = in.log2phy + known * p.max_replicas;
    bool wrong = expert != known || named[0] != first_slot + i;
#pragma unroll 1
    for (int32_t place = n_named; place < p.max_replicas; ++place) wrong |= named[place] != -1;
    if (!wrong) continue;
    atomicOr(&memory.status[p.by_group.Quotient(rank)], kBadPlacement);
    all_right = false;
  }
  return all_right;
}

// The same for redundant slots: each must be the second slot of the expert that it copies along
// r2o.
__device__ __forceinline__ bool CheckCopies(const Problem& p, const SolveOperands& in,
                                            Groups groups, const GroupMemory& memory, int32_t first,
                                            int32_t stride) {
  bool all_right = true;
  const int32_t first_slot = groups.first * p.group_size * p.slots_per_rank;
#pragma unroll 1
  for (int32_t i = first; i < groups.n * p.group_size * p.n_redundant; i += stride) {
    const int32_t rank = p.by_redundant.Quotient(i);
    const int32_t k = i - rank * p.n_redundant;
    const int32_t group = p.by_group.Quotient(rank);
    const int32_t first_rank = group * p.group_size;
    const int32_t column = p.by_columns.Remainder(k);
    const int32_t source = memory.src[(rank - first_rank) * p.n_columns + column];
    const int32_t slot = first_slot + rank * p.slots_per_rank + p.n_local + k;
    const int32_t expert = in.phy2log[slot];
    const int32_t original = in.phy2log[first_slot + (first_rank + source) * p.slots_per_rank + k];
    const int32_t known = KnownExpert(p, expert);
    if (expert != known || expert != original || in.log2phy[known * p.max_replicas + 1] != slot) {
      atomicOr(&memory.status[group], kBadPlacement);
      all_right = false;
    }
  }
  return all_right;
}

// Writes the quotas of a replicated expert. An edge's tokens are taken from its experts in order.
template <typename Load>
__device__ __forceinline__ void FinishCopy(const Copy<Load>& copy, const Load* moved, Load* quota) {
  const Load left = moved[copy.edge] - copy.before;
  const Load away = min(max(left, Load{0}), copy.load);
  quota[copy.own_slot] = copy.load - away;
  quota[copy.copy_slot] = away;
}

// The most an edge could move: the loads of its owner's replicated experts in this column.
template <typename Load>
__device__ __forceinline__ Load CapacityOf(const Problem& p, const GroupMemory& memory,
                                           int32_t group, int32_t rank, int32_t column) {
  Load sum = 0;
  if (memory.dst[rank * p.n_columns + column] == rank) return sum;
  const Load* own =
      reinterpret_cast<const Load*>(memory.own) + (group * p.group_size + rank) * p.n_local;
#pragma unroll 1
  for (int32_t k = column; k < p.n_redundant; k += p.n_columns) sum = AddLoad(sum, own[k]);
  return sum;
}

// What a group's plan achieves and what is proven.
struct Proof {
  int32_t max_load;
  int32_t lower_bound;
};

// Solves one group in the registers of one warp. Every lane gets the proof.
template <int kWords, int kColumns>
__device__ __forceinline__ Proof SolveInWarp(const Problem& p, int32_t group,
                                             const GroupMemory& memory) {
  const int32_t lane = threadIdx.x & 31;
  WarpGraph<kWords, kColumns> graph;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + lane;
    const bool live = rank < p.group_size;
    const int32_t place = live ? rank : 0;
    const int32_t load = memory.base[group * p.group_size + place];
    const int32_t* own = memory.own + (group * p.group_size + place) * p.n_local;
    graph.load[w] = live ? load : 0;
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      const int32_t src = memory.src[place * kColumns + d];
      const int32_t dst = memory.dst[place * kColumns + d];
      graph.src[d][w] = live ? src : rank;
      graph.dst[d][w] = live ? dst : rank;
    }
    uint32_t tokens[kColumns] = {};  // See CapacityOf.
#pragma unroll 1
    for (int32_t k = 0; k < p.n_redundant; k += kColumns) {
#pragma unroll
      for (int d = 0; d < kColumns; ++d) {
        tokens[d] =
            min(tokens[d] + static_cast<uint32_t>(own[k + d]), static_cast<uint32_t>(kInt32Max));
      }
    }
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      graph.cap[d][w] = graph.dst[d][w] == rank ? 0 : static_cast<int32_t>(tokens[d]);
    }
  }
  const int32_t target = WarpFirstTarget(p.by_group, graph);
  // A plan's rank loads never exceed this sum, so if it fits, nothing in the waves overflows. An
  // earlier overflow, base −1, reads as more than 2³¹ anyway.
  bool overflow = false;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint32_t most = graph.load[w];
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      most = min(most, 1u << 31) + static_cast<uint32_t>(ValueOf(graph.cap[d], graph.src[d][w]));
    }
    overflow |= most > static_cast<uint32_t>(kInt32Max);
  }
  Proof proof = {kInt32Max, 0};
  const bool solvable = !__any_sync(kFullWarp, overflow);
  if (solvable) {  // Otherwise nothing moves and nothing is proven.
    proof.lower_bound = proof.max_load = WarpWaves(p.group_size, target, graph);
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + lane;
#pragma unroll
    for (int d = 0; d < kColumns; ++d) {
      if (rank < p.group_size) {
        memory.moved[(group * p.group_size + rank) * kColumns + d] = graph.moved[d][w];
      }
    }
  }
  if (!solvable && lane == 0) atomicOr(&memory.status[group], kLoadOverflow);
  return proof;
}

// Solves one group of any shape in shared memory, with the team. Every thread gets the proof.
template <typename Threads>
__device__ inline Proof SolveInBlock(const Problem& p, int32_t group, const GroupMemory& memory) {
  const int32_t first_rank = group * p.group_size;
  int32_t* moved = memory.moved + first_rank * p.n_columns;
  int32_t* load = memory.base + first_rank;
  for (int32_t i = threadIdx.x; i < p.group_size * p.n_columns; i += Threads::Size()) {
    const int32_t rank = p.by_columns.Quotient(i);
    memory.cap[i] = CapacityOf<int32_t>(p, memory, group, rank, i - rank * p.n_columns);
    memory.dst[i] = min(max(memory.dst[i], 0), p.group_size - 1);  // See StoreEdge.
    moved[i] = 0;
  }
  Threads::Sync();
  bool overflow = false;
  for (int32_t r = threadIdx.x; r < p.group_size; r += Threads::Size()) {
    int64_t most = static_cast<uint32_t>(load[r]);  // −1 overflowed earlier.
    for (int32_t d = 0; d < p.n_columns; ++d) {
      most += memory.cap[memory.src[r * p.n_columns + d] * p.n_columns + d];
    }
    overflow |= most > kInt32Max;
  }
  Proof proof = {kInt32Max, 0};
  if (!Threads::Any(overflow)) {
    const BlockGraph graph = {p.group_size, p.n_columns,  memory.src,
                              memory.dst,   memory.cap,   moved,
                              load,         memory.level, reinterpret_cast<uint32_t*>(memory.sums)};
    proof.lower_bound = proof.max_load =
        BlockWaves<Threads>(graph, BlockFirstTarget<Threads>(graph));
  } else if (threadIdx.x == 0) {
    atomicOr(&memory.status[group], kLoadOverflow);
  }
  Threads::Sync();
  return proof;
}

// How a problem's groups are solved: in the registers of a warp, kWords ranks per lane, or, if both
// are 0, by the block in shared memory.
template <int words, int columns>
struct SolverShape {
  static constexpr int kWords = words;
  static constexpr int kColumns = columns;
};

// Calls `function` with the problem's SolverShape.
template <typename Function>
auto WithSolverShape(const Problem& p, Function&& function) {
  if (p.group_size <= 32 && p.n_columns == 1) return function(SolverShape<1, 1>());
  if (p.group_size <= 32 && p.n_columns == 2) return function(SolverShape<1, 2>());
  if (p.group_size <= 32 && p.n_columns == 3) return function(SolverShape<1, 3>());
  if (p.group_size <= 32 && p.n_columns == 4) return function(SolverShape<1, 4>());
  if (p.group_size <= 64 && p.n_columns == 1) return function(SolverShape<2, 1>());
  if (p.group_size <= 64 && p.n_columns == 2) return function(SolverShape<2, 2>());
  return function(SolverShape<0, 0>());
}

// Checks the slot in PrefetchedSlot, for which FetchHome was called. On an error, sets the group's
// status and returns false.
__device__ __forceinline__ bool CheckPrefetched(const Problem& p, Groups groups,
                                                const PrefetchedSlot& fetched,
                                                const GroupMemory& memory) {
  if (fetched.slot < 0) return true;
  const int32_t slot_rank = p.by_slots.Quotient(fetched.slot);
  const bool has_copy = fetched.slot - slot_rank * p.slots_per_rank < p.n_redundant;
  if (fetched.home == fetched.slot && fetched.expert == KnownExpert(p, fetched.expert) &&
      (has_copy || fetched.copy == -1)) {
    return true;
  }
  const int32_t rank = slot_rank - groups.first * p.group_size;
  atomicOr(&memory.status[p.by_group.Quotient(rank)], kBadPlacement);
  return false;
}

// Solves all groups, one warp each. Meanwhile the other warps do the work that needs no plan. Then,
// after a barrier, writes the quotas to `quota` of the block's first slot. One thread per group
// calls `proofs(group, proof)`. A barrier must follow before status is read or quota used. Returns
// whether the slots that this thread checked are right.
template <int kWords, int kColumns, typename Threads, typename Proofs>
__device__ __forceinline__ bool SolveGroups(const Problem& p, const SolveOperands& in,
                                            Groups groups, const GroupMemory& memory,
                                            int32_t* quota, const Proofs& proofs) {
  const int32_t n_warps = Threads::Size() / 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t n_copies = groups.n * p.group_size * p.n_redundant;
  // Warps 0 … busy − 1 solve. If that would be all warps, all share the rest.
  const int32_t busy = kWords > 0 && groups.n < n_warps ? groups.n : 0;
  const int32_t first = static_cast<int32_t>(threadIdx.x) - 32 * busy;
  const int32_t stride = Threads::Size() - 32 * busy;
  if constexpr (kWords > 0) {
#pragma unroll 1
    for (int32_t g = warp; g < groups.n; g += n_warps) {
      const Proof proof = SolveInWarp<kWords, kColumns>(p, g, memory);
      if ((threadIdx.x & 31) == 0) proofs(g, proof);
    }
  } else {
    for (int32_t g = 0; g < groups.n; ++g) {
      const Proof proof = SolveInBlock<Threads>(p, g, memory);
      if (threadIdx.x == 0) proofs(g, proof);
    }
  }
  bool right = true;
  Copy<int32_t> copy;  // The first, often the only one, is prepared while others solve.
  if (first >= 0) {
    if (first < n_copies) copy = PrepareCopy<int32_t>(p, memory, first);
    WriteFixedQuotas(p, groups, memory, quota, first, stride);
    // Starts from the other end, since it waits for global memory as long as a short solve takes.
    right = CheckCopies(p, in, groups, memory, stride - 1 - first, stride);
    right &= CheckOwnSlots(p, in, groups, memory, AllPrefetched<Threads>(p, groups), first, stride);
  }
  Threads::Sync();
  if (first < 0) return true;
#pragma unroll 1
  for (int32_t i = first; i < n_copies; i += stride) {
    if (i != first) copy = PrepareCopy<int32_t>(p, memory, i);
    FinishCopy(copy, memory.moved, quota);
  }
  return right;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_SOLVER_CUH_
