// Any placement as a graph in shared memory: which ranks host which expert, and the tokens of every
// cell. A cell is an (expert, rank) pair with a slot; a second slot of the same pair serves
// nothing. lplb_jax/reference/graph.py is the specification.
//
// Threads is the team that works on it: Block, or a Team.
#ifndef LPLB_CUDA_REPLICA_GRAPH_CUH_
#define LPLB_CUDA_REPLICA_GRAPH_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/cluster.cuh"
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
  uint32_t* mask;     // [n_logical, kWords], the expert's ranks
  int32_t* first;     // [n_logical], a shared expert's first cell
  int32_t* home;      // [n_logical], the expert's home slot; −1 where it has no slot at all. Until
                      // that is known, whether some rank hosts it twice.
  uint32_t* of_slot;  // [n_physical], packed slots
  int32_t* tokens;    // [n_physical], by cell
  int32_t* slot;      // [n_physical], by cell
  uint32_t* place;    // [n_physical], by cell: its number of its expert's, and, above, how many
  uint32_t* shared;   // [ep_size, slots_per_rank], the rank's slots of shared experts, packed
  uint32_t* is_shared;  // [SlotWords], which slots those are
  int32_t* load;        // [ep_size]
  int32_t* loose;       // [ep_size], tokens that could leave the rank, before the waves
  int32_t* more;        // [ep_size], tokens that could come, if all of its experts' did
  uint32_t* search;     // [ep_size, SearchWords], for GraphWaves; in steps of 16 bytes
  int32_t* n_cells;
  int32_t* target;
  int32_t* status;  // set by whoever builds the graph

  LPLB_HOST_DEVICE static int32_t SlotWords(const Problem& p) { return (p.n_physical + 31) / 32; }

  LPLB_HOST_DEVICE static int32_t SearchWords(int32_t n_words) {
    return n_words == 1 ? 4 : n_words <= 4 ? 8 : 2;
  }

  LPLB_HOST_DEVICE static int32_t Words(const Problem& p) {
    const int32_t words = GraphWords(p.ep_size);
    return p.n_logical * (words + 2) + 5 * p.n_physical + SlotWords(p) +
           p.ep_size * (3 + SearchWords(words)) + 3 + 3;
  }

  __device__ GraphMemory(const Problem& p, int32_t n_words, int32_t* memory) {
    const uint32_t address = (SharedAddress(memory) + 15) / 16 * 16;
    search = static_cast<uint32_t*>(__cvta_shared_to_generic(address));
    mask = search + p.ep_size * SearchWords(n_words);
    first = reinterpret_cast<int32_t*>(mask + p.n_logical * n_words);
    home = first + p.n_logical;
    of_slot = reinterpret_cast<uint32_t*>(home + p.n_logical);
    tokens = reinterpret_cast<int32_t*>(of_slot + p.n_physical);
    slot = tokens + p.n_physical;
    place = reinterpret_cast<uint32_t*>(slot + p.n_physical);
    shared = place + p.n_physical;
    is_shared = shared + p.n_physical;
    load = reinterpret_cast<int32_t*>(is_shared + SlotWords(p));
    loose = load + p.ep_size;
    more = loose + p.ep_size;
    n_cells = more + p.ep_size;
    target = n_cells + 1;
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

// How many of the slots from `begin` to before `end` are cells of shared experts.
__device__ __forceinline__ int32_t SharedSlots(const GraphMemory& graph, int32_t begin,
                                               int32_t end) {
  int32_t n = 0;
#pragma unroll 1
  for (int32_t w = begin >> 5; 32 * w < end; ++w) {
    uint32_t bits = graph.is_shared[w];
    if (32 * w < begin) bits &= ~0u << (begin & 31);
    if (32 * w + 32 > end) bits &= ~(~0u << (end & 31));
    n += __popc(bits);
  }
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

// Leaves every cell that has several slots to the first of them. Ends with a barrier. Out of line,
// since it would be in the way where there are none.
template <typename Threads>
__device__ __noinline__ void KeepFirstSlots(Divisor by_slots, int32_t n_physical,
                                            const int32_t* twice, uint32_t* of_slot,
                                            uint32_t* kept) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < n_physical; i += Threads::Size()) {
    const uint32_t expert = of_slot[i];
    bool is_first = true;
    if (expert != kNoExpert && twice[expert]) {
#pragma unroll 4
      for (int32_t k = by_slots.Quotient(i) * by_slots.divisor; k < i; ++k) {
        is_first &= of_slot[k] != expert;
      }
    }
    kept[i] = is_first ? expert : kNoExpert;
  }
  Threads::Sync();
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < n_physical; i += Threads::Size()) of_slot[i] = kept[i];
  Threads::Sync();
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

// Before BuildGraph; a barrier must follow.
template <int kWords, typename Threads>
__device__ __forceinline__ void ClearGraph(const Problem& p, const GraphMemory& graph) {
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_logical * kWords; i += Threads::Size()) graph.mask[i] = 0;
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) graph.home[e] = false;
#pragma unroll 1
  for (int32_t r = threadIdx.x; r < p.ep_size; r += Threads::Size()) {
    graph.load[r] = graph.loose[r] = graph.more[r] = 0;
  }
  if (threadIdx.x == 0) *graph.n_cells = 0;
}

// Builds the graph, which needs no loads. All threads of the team call it; ends with a barrier.
// *status must have been set before; bits are added.
template <int kWords, typename Threads>
__device__ inline void BuildGraph(const Problem& p, const int32_t* phy2log, const int32_t* log2phy,
                                  const PrefetchedGraph& fetched, const GraphMemory& graph) {
  const int32_t thread = threadIdx.x;
  const int32_t n_threads = Threads::Size();
  bool bad = false;
  bool twice = false;
#pragma unroll 1
  for (int32_t i = thread; i < p.n_physical; i += n_threads) {
    const int32_t expert = i == thread               ? fetched.expert[0]
                           : i == thread + n_threads ? fetched.expert[1]
                                                     : phy2log[i];
    const bool known = expert >= 0 && expert < p.n_logical;
    bad |= !known && expert != -1;
    graph.of_slot[i] = known ? static_cast<uint32_t>(expert) : kNoExpert;
    if (!known) continue;
    const int32_t rank = p.by_slots.Quotient(i);
    const uint32_t bit = 1u << (rank & 31);
    if (atomicOr(&graph.mask[expert * kWords + (rank >> 5)], bit) & bit) {
      graph.home[expert] = twice = true;
    }
  }
  if (Threads::Any(twice)) {
    KeepFirstSlots<Threads>(p.by_slots, p.n_physical, graph.home, graph.of_slot, graph.shared);
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
  // From the other end, where threads have less to do. A warp takes 32 slots in a row.
  const int32_t last = n_threads - 32 - thread + 2 * (thread & 31);
#pragma unroll 1
  for (int32_t begin = 0; begin < p.n_physical; begin += n_threads) {
    const int32_t i = begin + last;
    const uint32_t expert = i < p.n_physical ? graph.of_slot[i] : kNoExpert;
    const bool shared = expert != kNoExpert && HostsOf<kWords>(graph, expert) > 1;
    const uint32_t bits = __ballot_sync(kFullWarp, shared);
    if ((thread & 31) == 0 && i < p.n_physical) graph.is_shared[i >> 5] = bits;
  }
  Threads::Sync();

#pragma unroll 1
  for (int32_t i = thread; i < p.n_physical; i += n_threads) {
    const uint32_t expert = graph.of_slot[i];
    if ((graph.is_shared[i >> 5] >> (i & 31) & 1) == 0) {
      graph.of_slot[i] = expert | kNoNumber << 16;
      continue;
    }
    const int32_t rank = p.by_slots.Quotient(i);
    const int32_t begin = rank * p.slots_per_rank;
    const int32_t place = PlaceOf<kWords>(graph.mask + expert * kWords, rank);
    const int32_t cell = graph.first[expert] + place;
    const uint32_t packed = expert | static_cast<uint32_t>(cell) << 16;
    graph.of_slot[i] = packed;
    graph.slot[cell] = i;
    graph.place[cell] = place | HostsOf<kWords>(graph, expert) << 16;
    graph.shared[begin + SharedSlots(graph, begin, i)] = packed;
  }
  if (bad) atomicOr(graph.status, kBadPlacement);
  Threads::Sync();
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_REPLICA_GRAPH_CUH_
