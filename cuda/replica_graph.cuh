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
  uint32_t* search;  // [SearchWords, ep_size], for GraphWaves
  // From here on to the loads, ClearGraph makes all 0 at first.
  uint32_t* mask;       // [n_logical, kWords], the expert's ranks
  uint32_t* is_shared;  // [ep_size, SlotWords], which slots of the rank are shared experts'
  uint32_t* late;       // [ep_size, SlotWords], which found their cell with a slot already
  int32_t* loose;       // [ep_size], tokens that could leave the rank, before the waves
  int32_t* any_twice;   // whether some cell has several slots
  int32_t* n_cells;
  int32_t* status;
  int32_t* load;      // [ep_size]; at first, what a base gives, or 0
  int32_t* first;     // [n_logical], a shared expert's first cell
  int32_t* home;      // [n_logical], the expert's home slot; −1 where it has no slot at all
  uint32_t* of_slot;  // [n_physical], packed slots
  int32_t* tokens;    // [n_physical], by cell
  int32_t* slot;      // [n_physical], by cell
  uint32_t* place;    // [n_physical], by cell: its number of its expert's, and, above, how many
  uint32_t* shared;   // [ep_size, slots_per_rank], the rank's slots of shared experts, packed
  int32_t* target;

  LPLB_HOST_DEVICE static int32_t SlotWords(const Problem& p) {
    return (p.slots_per_rank + 31) / 32;
  }

  LPLB_HOST_DEVICE static int32_t SearchWords(int32_t n_words) {
    return n_words <= 4 ? n_words : 2;
  }

  // Where the words of a set of ranks are known, or not.
  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_words) {
    return p.ep_size * (SearchWords(n_words) + 2 * SlotWords(p) + 2) + p.n_logical * (n_words + 2) +
           5 * p.n_physical + 4;
  }
  LPLB_HOST_DEVICE static int32_t Words(const Problem& p) {
    return Words(p, GraphWords(p.ep_size));
  }

  __device__ GraphMemory(const Problem& p, int32_t n_words, int32_t* memory) {
    search = reinterpret_cast<uint32_t*>(memory);
    mask = search + p.ep_size * SearchWords(n_words);
    is_shared = mask + p.n_logical * n_words;
    late = is_shared + p.ep_size * SlotWords(p);
    loose = reinterpret_cast<int32_t*>(late + p.ep_size * SlotWords(p));
    any_twice = loose + p.ep_size;
    n_cells = any_twice + 1;
    status = n_cells + 1;
    load = status + 1;
    first = load + p.ep_size;
    home = first + p.n_logical;
    of_slot = reinterpret_cast<uint32_t*>(home + p.n_logical);
    tokens = reinterpret_cast<int32_t*>(of_slot + p.n_physical);
    slot = tokens + p.n_physical;
    place = reinterpret_cast<uint32_t*>(slot + p.n_physical);
    shared = place + p.n_physical;
    target = reinterpret_cast<int32_t*>(shared + p.n_physical);
  }
};

// Words that SolveTiles needs besides the graph and the tiles by slot.
LPLB_HOST_DEVICE int32_t PlacesWords(const Problem& p) { return 2 * p.ep_size; }

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

// Adds, and returns what was there. Written as an instruction, since atomicAdd compiles to more.
__device__ __forceinline__ int32_t FetchAdd(int32_t* shared, int32_t value) {
  int32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(value)
               : "memory");
  return before;
}

// A slot of an expert whose home slot is not what it should be; −1 where there is none. Inline, see
// SmallDivisor.
__device__ __forceinline__ int32_t AnySlotOf(uint32_t expert, const uint32_t* of_slot,
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

// Where a slot is on its rank.
struct PlacedSlot {
  int32_t slot;
  int32_t rank;
  int32_t k;

  PlacedSlot() = default;
  __device__ __forceinline__ PlacedSlot(const Problem& p, int32_t slot_)
      : slot(slot_), rank(p.by_slots.Quotient(slot_)), k(slot_ - rank * p.slots_per_rank) {}
};

// The cell of a slot, as far as the experts' ranks tell it.
struct SlotCell {
  uint32_t expert;
  int32_t n_hosts;  // of the expert
  int32_t place;    // which of them the slot's is

  SlotCell() = default;
  template <int kWords>
  static __device__ __forceinline__ SlotCell Of(const GraphMemory& graph, const PlacedSlot& at) {
    return Of<kWords>(graph, at, ExpertIn(graph.of_slot[at.slot]));
  }
  template <int kWords>
  static __device__ __forceinline__ SlotCell Of(const GraphMemory& graph, const PlacedSlot& at,
                                                uint32_t expert) {
    if (expert == kNoExpert) return {expert, 0, 0};
    return {expert, HostsOf<kWords>(graph, expert),
            PlaceOf<kWords>(graph.mask + expert * kWords, at.rank)};
  }
  __device__ __forceinline__ bool IsShared() const { return n_hosts > 1; }
};

// A slot as it is in the graph.
struct BuiltSlot {
  PlacedSlot at;
  uint32_t packed;  // graph.of_slot
  uint32_t place;   // graph.place of its cell, if it has one

  __device__ __forceinline__ BuiltSlot(const PlacedSlot& at_, uint32_t packed_, uint32_t place_)
      : at(at_), packed(packed_), place(place_) {}
  __device__ __forceinline__ BuiltSlot(const GraphMemory& graph, const PlacedSlot& at_)
      : at(at_), packed(graph.of_slot[at_.slot]) {
    place = CellIn(packed) != kNoNumber ? graph.place[CellIn(packed)] : 0;
  }
};

// Calls use(at, is_first) for the thread's slots, threadIdx.x, threadIdx.x + Threads::Size(), … The
// first, mostly the only one, takes no loop, so that what is known of it stays in registers.
template <typename Threads, typename Use>
__device__ __forceinline__ void ForSlots(const Problem& p, const PlacedSlot& first,
                                         const Use& use) {
  if (first.slot < p.n_physical) use(first, std::true_type());
#pragma unroll 1
  for (int32_t i = first.slot + Threads::Size(); i < p.n_physical; i += Threads::Size()) {
    use(PlacedSlot(p, i), std::false_type());
  }
}

// Of a cell that has several slots, the one that is not late leaves it to the first of them.
// graph.slot has the experts of all slots.
__device__ __forceinline__ void KeepFirstSlot(const GraphMemory& graph, const PlacedSlot& at,
                                              int32_t slot_words) {
  const int32_t expert = graph.slot[at.slot];
  const uint32_t* const late = graph.late + at.rank * slot_words;
  if (expert == kNoExpert || (late[at.k >> 5] >> (at.k & 31) & 1) != 0) return;
  const int32_t first_slot = at.slot - at.k;
  int32_t kept = at.k;
#pragma unroll 1
  for (int32_t w = 0; w < slot_words; ++w) {
#pragma unroll 1
    for (uint32_t bits = late[w]; bits != 0; bits &= bits - 1) {
      const int32_t k = 32 * w + __ffs(bits) - 1;
      if (graph.slot[first_slot + k] != expert) continue;
      graph.of_slot[first_slot + max(k, kept)] = kNoExpert;
      kept = min(k, kept);
    }
  }
}

// Prepares the graph's memory, before BuildGraph; base(rank) is a rank's load besides its experts.
// Makes all words from `from` on 0 in one loop: graph.mask, or the first of other words to be
// cleared that the graph follows. All threads of the team call it.
template <typename Threads, typename Base>
__device__ __forceinline__ void ClearGraph(const Problem& p, Base&& base, void* from,
                                           const GraphMemory& graph) {
  constexpr bool kLoads = !std::is_same_v<std::decay_t<Base>, NoBase>;
  int32_t* const words = static_cast<int32_t*>(from);
  const auto n = static_cast<int32_t>((kLoads ? graph.load : graph.first) - words);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < n; i += Threads::Size()) words[i] = 0;
  if constexpr (kLoads) {
#pragma unroll 1
    for (int32_t r = threadIdx.x; r < p.ep_size; r += Threads::Size()) graph.load[r] = base(r);
  }
}

// Builds the graph, for which no loads are needed. All threads of the team call it behind
// ClearGraph. Calls use(BuiltSlot) for the thread's slots when they are built. A barrier must
// follow. Adds bits to *status.
template <int kWords, typename Threads, typename Use>
__device__ inline void BuildGraph(const Problem& p, const int32_t* phy2log, const int32_t* log2phy,
                                  const PrefetchedGraph& fetched, const GraphMemory& graph,
                                  const Use& use) {
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = Threads::Size();
  const int32_t slot_words = GraphMemory::SlotWords(p);
  const PlacedSlot mine(p, thread);
  bool bad = false;
  uint32_t my_expert = kNoExpert;
  Threads::Sync();

  ForSlots<Threads>(p, mine, [&](const PlacedSlot& at, auto is_first) {
    const int32_t expert = is_first                        ? fetched.expert[0]
                           : at.slot == thread + n_threads ? fetched.expert[1]
                                                           : phy2log[at.slot];
    const bool known = expert >= 0 && expert < p.n_logical;
    bad |= !known && expert != -1;
    graph.of_slot[at.slot] = graph.slot[at.slot] = known ? expert : kNoExpert;
    if constexpr (is_first) my_expert = known ? expert : kNoExpert;
    if (!known) return;
    const uint32_t bit = 1u << (at.rank & 31);
    if (atomicOr(&graph.mask[expert * kWords + (at.rank >> 5)], bit) & bit) {
      atomicOr(&graph.late[at.rank * slot_words + (at.k >> 5)], 1u << (at.k & 31));
      atomicOr(graph.any_twice, 1);
    }
  });
  Threads::Sync();
  if (*graph.any_twice != 0) {
    ForSlots<Threads>(p, mine,
                      [&](const PlacedSlot& at, auto) { KeepFirstSlot(graph, at, slot_words); });
    Threads::Sync();
    if (thread < p.n_physical) my_expert = ExpertIn(graph.of_slot[thread]);
  }

  const SlotCell my_cell = SlotCell::Of<kWords>(graph, mine, my_expert);
  const auto add_expert = [&](int32_t e, int32_t home) {
    const int32_t n_hosts = HostsOf<kWords>(graph, e);
    int32_t first = 0;
    if (n_hosts > 1) first = FetchAdd(graph.n_cells, n_hosts);
    const bool right = home >= 0 && home < p.n_physical && ExpertIn(graph.of_slot[home]) == e;
    if (!right) home = AnySlotOf(e, graph.of_slot, p.n_physical);
    bad |= !right;
    graph.home[e] = home;
    graph.first[e] = first;  // Not earlier, since it takes a while to come.
  };
  if (thread < p.n_logical) add_expert(thread, fetched.home);
#pragma unroll 1
  for (int32_t e = thread + n_threads; e < p.n_logical; e += n_threads) {
    add_expert(e, log2phy[e * p.max_replicas]);
  }
  ForSlots<Threads>(p, mine, [&](const PlacedSlot& at, auto is_first) {
    const SlotCell cell = is_first ? my_cell : SlotCell::Of<kWords>(graph, at);
    if (!cell.IsShared()) return;
    atomicOr(&graph.is_shared[at.rank * slot_words + (at.k >> 5)], 1u << (at.k & 31));
  });
  Threads::Sync();

  // The cells' numbers, and the list of every rank.
  ForSlots<Threads>(p, mine, [&](const PlacedSlot& at, auto is_first) {
    const SlotCell cell = is_first ? my_cell : SlotCell::Of<kWords>(graph, at);
    if (!cell.IsShared()) {
      const uint32_t packed = cell.expert | kNoNumber << 16;
      graph.of_slot[at.slot] = packed;
      use(BuiltSlot(at, packed, 0));
      return;
    }
    const int32_t nth = NthShared(graph.is_shared + at.rank * slot_words, at.k);
    const int32_t number = graph.first[cell.expert] + cell.place;
    const uint32_t packed = cell.expert | static_cast<uint32_t>(number) << 16;
    graph.of_slot[at.slot] = packed;
    graph.slot[number] = at.slot;
    const uint32_t place = cell.place | cell.n_hosts << 16;
    graph.place[number] = place;
    graph.shared[at.rank * p.slots_per_rank + nth] = packed;
    use(BuiltSlot(at, packed, place));
  });
  if (bad) atomicOr(graph.status, kBadPlacement);
}

template <int kWords, typename Threads>
__device__ inline void BuildGraph(const Problem& p, const int32_t* phy2log, const int32_t* log2phy,
                                  const PrefetchedGraph& fetched, const GraphMemory& graph) {
  BuildGraph<kWords, Threads>(p, phy2log, log2phy, fetched, graph, [](const BuiltSlot&) {});
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_REPLICA_GRAPH_CUH_
