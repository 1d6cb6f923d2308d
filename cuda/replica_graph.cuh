// Any placement as a graph in shared memory: which ranks host which expert, and the tokens of every
// cell. A cell is an (expert, rank) pair with a slot; a second slot of the same pair serves
// nothing. lplb_jax/reference/graph.py is the specification.
//
// Threads is the team that works on it: Block, or a Team.
#ifndef LPLB_CUDA_REPLICA_GRAPH_CUH_
#define LPLB_CUDA_REPLICA_GRAPH_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/problem.h"
#include "cuda/solver.cuh"
#include "cuda/team.cuh"
#include "cuda/warp.cuh"

namespace lplb::cuda {

// 32-bit words of a set of ranks: few values, since every one is a kernel of its own.
LPLB_HOST_DEVICE int32_t GraphWords(int32_t n_ranks) {
  return n_ranks <= 32 ? 1 : n_ranks <= 64 ? 2 : n_ranks <= 128 ? 4 : 16;
}

// Calls `function` with them as a type.
template <typename Function>
auto WithGraphWords(const Problem& p, Function&& function) {
  switch (GraphWords(p.ep_size)) {
    case 1:
      return function(std::integral_constant<int, 1>());
    case 2:
      return function(std::integral_constant<int, 2>());
    case 4:
      return function(std::integral_constant<int, 4>());
    default:
      return function(std::integral_constant<int, 16>());
  }
}

// A slot, packed: its expert and, in the upper half, the number of its cell.
constexpr uint32_t kNoExpert = 0xffff;  // where it is empty, or not the first of its cell
constexpr uint32_t kNoNumber = 0xffff;  // of an expert on one rank only, whose cell needs none

// The graph in shared memory, in words of 32 bits. Cells are those of shared experts, which are on
// several ranks: an expert's are consecutive, in the order of the ranks. Where they begin is up to
// the order in which threads come, and nothing depends on it.
struct GraphMemory {
  uint32_t* mask;       // [n_logical, kWords], the expert's ranks
  int32_t* first;       // [n_logical], a shared expert's first cell
  int32_t* home;        // [n_logical], the expert's home slot; −1 where it has no slot at all
  uint32_t* of_slot;    // [n_physical], packed slots
  int32_t* tokens;      // [n_physical], by cell
  int32_t* slot;        // [n_physical], by cell
  uint32_t* place;      // [n_physical], by cell: its number of its expert's, and, above, how many
  uint32_t* shared;     // [ep_size, slots_per_rank], the rank's slots of shared experts, packed
  uint32_t* is_shared;  // [ep_size, SlotWords], which slots of the rank those are
  int32_t* load;        // [ep_size]
  int32_t* loose;       // [ep_size], tokens that could leave the rank, before the waves
  uint32_t* search;     // [SearchWords, ep_size], for GraphWaves
  int32_t* n_cells;
  int32_t* any_twice;  // whether some cell has several slots
  int32_t* target;
  int32_t* status;  // set by whoever builds the graph

  LPLB_HOST_DEVICE static int32_t SlotWords(const Problem& p) {
    return (p.slots_per_rank + 31) / 32;
  }

  LPLB_HOST_DEVICE static int32_t SearchWords(int32_t n_words) {
    return n_words <= 4 ? n_words : 2;
  }

  LPLB_HOST_DEVICE static int32_t Words(const Problem& p) {
    const int32_t words = GraphWords(p.ep_size);
    return p.n_logical * (words + 2) + 5 * p.n_physical +
           p.ep_size * (SlotWords(p) + 2 + SearchWords(words)) + 4;
  }

  __device__ GraphMemory(const Problem& p, int32_t n_words, int32_t* memory) {
    search = reinterpret_cast<uint32_t*>(memory);
    mask = search + p.ep_size * SearchWords(n_words);
    first = reinterpret_cast<int32_t*>(mask + p.n_logical * n_words);
    home = first + p.n_logical;
    of_slot = reinterpret_cast<uint32_t*>(home + p.n_logical);
    tokens = reinterpret_cast<int32_t*>(of_slot + p.n_physical);
    slot = tokens + p.n_physical;
    place = reinterpret_cast<uint32_t*>(slot + p.n_physical);
    shared = place + p.n_physical;
    is_shared = shared + p.n_physical;
    load = reinterpret_cast<int32_t*>(is_shared + p.ep_size * SlotWords(p));
    loose = load + p.ep_size;
    n_cells = loose + p.ep_size;
    any_twice = n_cells + 1;
    target = any_twice + 1;
    status = target + 1;
  }
};

__device__ __forceinline__ uint32_t ExpertIn(uint32_t packed_slot) { return packed_slot & 0xffff; }
__device__ __forceinline__ uint32_t CellIn(uint32_t packed_slot) { return packed_slot >> 16; }

template <int kWords>
__device__ __forceinline__ int32_t HostsOf(const GraphMemory& graph, int32_t expert) {
  int32_t n = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) n += __popc(graph.mask[expert * kWords + w]);
  return n;
}

// Which of an expert's cells is on `rank`, or would be; `mask` are its ranks.
template <int kWords>
__device__ __forceinline__ int32_t PlaceOf(const uint32_t* mask, int32_t rank) {
  int32_t place = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const uint32_t lower = w < rank >> 5 ? ~0u : w == rank >> 5 ? (1u << (rank & 31)) - 1 : 0;
    place += __popc(mask[w] & lower);
  }
  return place;
}

// What a thread fetches of the placement before the graph is built: its first two slots, and the
// home of its first expert. More wait for global memory when they come.
struct PrefetchedGraph {
  int32_t expert[2];  // in slots threadIdx.x and threadIdx.x + n_threads
  int32_t home;       // of expert threadIdx.x
};

__device__ __forceinline__ PrefetchedGraph PrefetchGraph(const Problem& p, int32_t n_threads,
                                                         const int32_t* phy2log,
                                                         const int32_t* log2phy) {
  const int32_t i = threadIdx.x;
  return {{i < p.n_physical ? phy2log[i] : -1,
           i + n_threads < p.n_physical ? phy2log[i + n_threads] : -1},
          i < p.n_logical ? log2phy[i * p.max_replicas] : -1};
}

// Ranks have no load besides their experts.
struct NoBase {
  __device__ __forceinline__ int32_t operator()(int32_t) const { return 0; }
};

// Adds, and returns what was there. As an instruction of its own: the compiler would let the warp
// add up first, which takes longer for the few threads that come here.
__device__ __forceinline__ int32_t FetchAdd(int32_t* shared, int32_t value) {
  int32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(value)
               : "memory");
  return before;
}

// Leaves every cell that has several slots to the first of them. graph.slot has the experts of all
// slots, and graph.first tells those with such a cell. Out of line, since it would be in the way
// where there are none.
template <typename Threads>
__device__ __noinline__ void KeepFirstSlots(GraphMemory graph, int32_t n_physical,
                                            Divisor by_slots) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < n_physical; i += Threads::Size()) {
    const int32_t expert = graph.slot[i];
    if (expert == kNoExpert || graph.first[expert] == 0) continue;
    bool before = false;
#pragma unroll 4
    for (int32_t k = by_slots.Quotient(i) * by_slots.divisor; k < i; ++k) {
      before |= graph.slot[k] == expert;
    }
    if (before) graph.of_slot[i] = kNoExpert;
  }
}

// A slot of an expert whose home slot is not what it should be; −1 where there is none.
[[maybe_unused]] static __device__ __noinline__ int32_t AnySlotOf(uint32_t expert,
                                                                  const uint32_t* of_slot,
                                                                  int32_t n_physical) {
#pragma unroll 1
  for (int32_t i = 0; i < n_physical; ++i) {
    if (ExpertIn(of_slot[i]) == expert) return i;
  }
  return -1;
}

// Which of a rank's shared slots its slot k is; `is_shared` tells them.
__device__ __forceinline__ int32_t NthShared(const uint32_t* is_shared, int32_t k) {
  int32_t n = __popc(is_shared[k >> 5] & ((1u << (k & 31)) - 1));
#pragma unroll 1
  for (int32_t w = 0; w < k >> 5; ++w) n += __popc(is_shared[w]);
  return n;
}

// Marks the slots of shared experts; no bit was set. Shared experts must have their first cells
// behind the barrier that must follow.
template <int kWords, typename Threads>
__device__ __forceinline__ void MarkShared(const Problem& p, const GraphMemory& graph,
                                           int32_t slot_words) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    const uint32_t expert = ExpertIn(graph.of_slot[i]);
    if (expert == kNoExpert || HostsOf<kWords>(graph, expert) == 1) continue;
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t k = i - rank * p.slots_per_rank;
    atomicOr(&graph.is_shared[rank * slot_words + (k >> 5)], 1u << (k & 31));
  }
}

// Numbers the cells and lists those of every rank, after MarkShared. A barrier must follow.
template <int kWords, typename Threads>
__device__ __forceinline__ void NumberCells(const Problem& p, const GraphMemory& graph,
                                            int32_t slot_words) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) {
    const uint32_t expert = ExpertIn(graph.of_slot[i]);
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t k = i - rank * p.slots_per_rank;
    const uint32_t* shared = graph.is_shared + rank * slot_words;
    if ((shared[k >> 5] >> (k & 31) & 1) == 0) {
      graph.of_slot[i] = expert | kNoNumber << 16;
      continue;
    }
    const int32_t place = PlaceOf<kWords>(graph.mask + expert * kWords, rank);
    const int32_t cell = graph.first[expert] + place;
    graph.of_slot[i] = expert | static_cast<uint32_t>(cell) << 16;
    graph.slot[cell] = i;
    graph.place[cell] = place | HostsOf<kWords>(graph, expert) << 16;
    graph.shared[rank * p.slots_per_rank + NthShared(shared, k)] = graph.of_slot[i];
  }
}

// Builds the graph, which needs no loads but base(rank), the load of a rank besides its experts.
// All threads of the team call it. A barrier must follow, but not for what concerns a thread's own
// slots, threadIdx.x, threadIdx.x + Threads::Size(), … *status must have been set before; bits are
// added.
template <int kWords, typename Threads, typename Base>
__device__ inline void BuildGraph(const Problem& p, const int32_t* phy2log, const int32_t* log2phy,
                                  const PrefetchedGraph& fetched, Base&& base,
                                  const GraphMemory& graph) {
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = Threads::Size();
  const int32_t slot_words = GraphMemory::SlotWords(p);
#pragma unroll 1
  for (int32_t i = thread; i < p.n_logical * kWords; i += n_threads) graph.mask[i] = 0;
#pragma unroll 1
  for (int32_t e = thread; e < p.n_logical; e += n_threads) graph.first[e] = 0;
#pragma unroll 1
  for (int32_t i = thread; i < p.ep_size * slot_words; i += n_threads) graph.is_shared[i] = 0;
#pragma unroll 1
  for (int32_t r = thread; r < p.ep_size; r += n_threads) {
    graph.load[r] = base(r);
    graph.loose[r] = 0;
  }
  if (thread == 0) *graph.n_cells = *graph.any_twice = 0;
  Threads::Sync();

  bool bad = false;
#pragma unroll 1
  for (int32_t i = thread; i < p.n_physical; i += n_threads) {
    const int32_t expert = i == thread               ? fetched.expert[0]
                           : i == thread + n_threads ? fetched.expert[1]
                                                     : phy2log[i];
    const bool known = expert >= 0 && expert < p.n_logical;
    bad |= !known && expert != -1;
    graph.of_slot[i] = graph.slot[i] = known ? expert : kNoExpert;
    if (!known) continue;
    const int32_t rank = p.by_slots.Quotient(i);
    const uint32_t bit = 1u << (rank & 31);
    if (atomicOr(&graph.mask[expert * kWords + (rank >> 5)], bit) & bit) {
      atomicOr(&graph.first[expert], 1);
      atomicOr(graph.any_twice, 1);
    }
  }
  Threads::Sync();
  if (*graph.any_twice != 0) {
    KeepFirstSlots<Threads>(graph, p.n_physical, p.by_slots);
    Threads::Sync();
  }

#pragma unroll 1
  for (int32_t e = thread; e < p.n_logical; e += n_threads) {
    const int32_t n_hosts = HostsOf<kWords>(graph, e);
    if (n_hosts > 1) graph.first[e] = FetchAdd(graph.n_cells, n_hosts);
    int32_t home = e == thread ? fetched.home : log2phy[e * p.max_replicas];
    const bool right = home >= 0 && home < p.n_physical && ExpertIn(graph.of_slot[home]) == e;
    if (!right) home = AnySlotOf(e, graph.of_slot, p.n_physical);
    bad |= !right;
    graph.home[e] = home;
  }
  MarkShared<kWords, Threads>(p, graph, slot_words);
  Threads::Sync();
  NumberCells<kWords, Threads>(p, graph, slot_words);
  if (bad) atomicOr(graph.status, kBadPlacement);
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_REPLICA_GRAPH_CUH_
