// Gives every token its slot. The kernels here count the tokens, get or solve the quotas, and
// assign: one launch of one thread-block cluster where the batch fits its registers, else one
// launch that counts tiles and one that assigns them.
//
// A token's ordinal among its expert's tokens, which decides where it goes, is the sum of the
// expert's tokens in earlier blocks, in earlier warps of its block, in earlier rounds of its warp,
// and in lower lanes. Warps hold consecutive tokens and blocks consecutive warps.
#ifndef LPLB_CUDA_ROUTE_CUH_
#define LPLB_CUDA_ROUTE_CUH_

#include <cooperative_groups.h>

#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/route.h"
#include "cuda/solver.cuh"
#include "cuda/sync.cuh"

namespace lplb::cuda {

constexpr int32_t kRouteThreads = 512;  // that hold tokens, at most
constexpr int32_t kPlanThreads = 256;   // of a cluster's block, besides those
constexpr int32_t kMaxRounds = 16;      // Tokens that a lane holds in registers.
constexpr int32_t kAtOnce = 8;          // Tokens of a tile that a lane has on their way.

// Calls `function` with the indices typed.
template <typename Function>
__device__ __forceinline__ void WithIndices(const TokenBuffers& tokens, Function&& function) {
  switch (tokens.type) {
    case IndexType::kInt32:
      return function(static_cast<const int32_t*>(tokens.indices));
    case IndexType::kInt64:
      return function(static_cast<const int64_t*>(tokens.indices));
    case IndexType::kUint8:
      return function(static_cast<const uint8_t*>(tokens.indices));
    case IndexType::kUint16:
      return function(static_cast<const uint16_t*>(tokens.indices));
  }
}

// A warp's state of one expert.
struct Cell {
  uint32_t mask;   // lanes with a token of this expert; 0 between uses
  uint32_t count;  // the warp's tokens so far; after a scan, plus those of the warps before
};

constexpr int32_t kNoSlot = 0xffff;

// Where an expert's tokens go, in 8 bytes: every token reads it.
struct PackedRoute {
  int32_t keep;      // tokens that stay at home
  uint16_t home;     // a slot, or kNoSlot
  uint16_t replica;  // likewise
};

// Shared memory of a block that routes tokens. Rows have room for all experts and, at n_logical,
// the ids that named none: where there are other ranks, `total` only has there whether any did.
struct RouteMemory {
  Cell* cells;          // [n_warps, n_logical + kPad]
  PackedRoute* routes;  // [n_logical]
  int32_t* earlier;     // [row], tokens in earlier blocks
  int32_t* total;       // [row], all tokens
  int32_t* own;         // [row], this rank's; the same as total where there is no other
  int32_t* before;      // [n_logical], where there are others: tokens that come before this rank's
  int32_t* quota;       // [n_physical]
  int32_t* groups;      // GroupMemory
  // Of a cluster's blocks:
  int32_t* counts;     // [row], the block's histogram
  uint16_t* incoming;  // [n_blocks, row], every block's
  uint64_t* arrivals;  // counts the bytes of `incoming`

  // Lets the lanes of ScanWarps, which read several rows at a time, meet different banks.
  static constexpr int32_t kPad = 4;
  // Counts that travel together.
  static constexpr int32_t kPacked = 8;

  LPLB_HOST_DEVICE static int32_t Row(const Problem& p) {
    return (p.n_logical + kPacked) / kPacked * kPacked;
  }

  LPLB_HOST_DEVICE static int32_t Bytes(const Problem& p, int32_t n_warps, int32_t n_blocks,
                                        Quotas quotas) {
    const int32_t row = Row(p);
    const int32_t words = 2 * n_warps * (p.n_logical + kPad) + 2 * p.n_logical + 2 * row +
                          p.n_physical + (n_blocks > 0 ? row + n_blocks * row / 2 + 2 : 0) +
                          (quotas != Quotas::kGiven ? GroupMemory::Words(p, p.n_groups) : 0) +
                          (quotas == Quotas::kSynced ? row + p.n_logical : 0);
    return 4 * words;
  }

  // What is read or written 16 bytes at a time comes first.
  __device__ RouteMemory(const Problem& p, int32_t n_warps, int32_t n_blocks, Quotas quotas,
                         void* memory) {
    const int32_t row = Row(p);
    // Kept in a register: the compiler would find it again for every use, which takes its time.
    uint32_t address = SharedAddress(memory);
    asm volatile("" : "+r"(address));
    cells = static_cast<Cell*>(__cvta_shared_to_generic(address));
    counts = reinterpret_cast<int32_t*>(cells + n_warps * (p.n_logical + kPad));
    incoming = reinterpret_cast<uint16_t*>(counts + (n_blocks > 0 ? row : 0));
    arrivals = reinterpret_cast<uint64_t*>(incoming + n_blocks * row);
    routes = reinterpret_cast<PackedRoute*>(arrivals + (n_blocks > 0 ? 1 : 0));
    earlier = reinterpret_cast<int32_t*>(routes + p.n_logical);
    total = earlier + row;
    own = total + (quotas == Quotas::kSynced ? row : 0);
    quota = own + row;
    groups = quota + p.n_physical;
    if (quotas == Quotas::kSynced) before = groups + GroupMemory::Words(p, p.n_groups);
  }

  __device__ Cell* CellsOf(const Problem& p, int32_t warp) const {
    return cells + warp * (p.n_logical + kPad);
  }
};

// Counts this lane's token of `expert` (−1: none) into its warp's cells; returns how many earlier
// tokens the cell had. All lanes call it.
__device__ __forceinline__ int32_t Rank(int32_t expert, Cell* cells) {
  const uint32_t lane = threadIdx.x & 31;
  const bool valid = expert >= 0;
  Cell* cell = cells + (valid ? expert : 0);
  if (valid) atomicOr(&cell->mask, 1u << lane);
  __syncwarp();
  const uint2 seen = *reinterpret_cast<const uint2*>(cell);
  const uint32_t lower = seen.x & ((1u << lane) - 1);
  __syncwarp();
  if (valid && lower == 0) {  // The first of them keeps the cell.
    *reinterpret_cast<uint2*>(cell) = {0, seen.y + __popc(seen.x)};
  }
  __syncwarp();
  return static_cast<int32_t>(seen.y + __popc(lower));
}

// Turns every warp's counts into the sums of the warps before; n_warps warps call it. A lane takes
// half of the rows of an expert; `counts` are 32-bit, row_stride and column_stride words apart.
// `emit(expert, total)` is called once for every expert.
template <typename Emit>
__device__ __forceinline__ void ScanWarps(int32_t n_logical, int32_t warp, int32_t n_warps,
                                          uint32_t* counts, int32_t row_stride,
                                          int32_t column_stride, const Emit& emit) {
  constexpr int kMaxRows = kRouteThreads / 64;
  const int32_t rows = n_warps / 2;
  const int32_t lane = threadIdx.x & 31;
  const int32_t half = lane >> 4;
#pragma unroll 1
  for (int32_t first = warp * 16; first < n_logical; first += n_warps * 16) {
    const int32_t expert = first + (lane & 15);
    const bool live = expert < n_logical;
    uint32_t* count = counts + half * rows * row_stride + expert * column_stride;
    uint32_t before[kMaxRows];
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) before[i] = i < rows && live ? count[i * row_stride] : 0;
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      const uint32_t own = before[i];
      before[i] = sum;
      sum += own;
    }
    const uint32_t other = __shfl_xor_sync(kFullWarp, sum, 16);
    if (!live) continue;
    const uint32_t first_half = half == 0 ? 0 : other;
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      if (i < rows) count[i * row_stride] = first_half + before[i];
    }
    if (half == 0) emit(expert, static_cast<int32_t>(sum + other));
  }
}

// What the threads that make the routes fetch before they need it, so that the latencies overlap.
struct Prefetched {
  Ahead ahead;     // its home is fetched later
  int32_t source;  // this thread's edge of r2o
  Route slots;     // of this thread's expert
};

template <Quotas kQuotas, typename Threads>
__device__ __forceinline__ Prefetched Prefetch(const RouteArguments& a, const SolveOperands& in,
                                               const int32_t* log2phy) {
  const Problem& p = a.problem;
  const int32_t i = threadIdx.x;
  Prefetched fetched = {{-1, 0, -1}, 0, {0, -1, -1}};
  if constexpr (kQuotas != Quotas::kGiven) {
    fetched.ahead = AheadOf<Threads>(p, in, {0, p.n_groups});
    if (i < p.group_size * p.n_columns) fetched.source = in.r2o[i];
  }
  if (i < p.n_logical) {
    fetched.slots.home = log2phy[i * p.max_replicas];
    fetched.slots.replica = log2phy[i * p.max_replicas + 1];
  }
  return fetched;
}

__device__ __forceinline__ void StoreSlots(const Problem& p, int32_t expert, int32_t home,
                                           int32_t replica, const RouteMemory& memory) {
  const auto packed = [&](int32_t slot) {
    return static_cast<uint16_t>(slot >= 0 && slot < p.n_physical ? slot : kNoSlot);
  };
  memory.routes[expert] = {kInt32Max, packed(home), packed(replica)};
}

// Puts what was fetched, and what of it is more than one per thread, into shared memory.
template <Quotas kQuotas, typename Threads>
__device__ __forceinline__ void StorePrefetched(const RouteArguments& a, const SolveOperands& in,
                                                const int32_t* log2phy, Prefetched& fetched,
                                                const RouteMemory& memory) {
  const Problem& p = a.problem;
  const int32_t i = threadIdx.x;
  if (i < p.n_logical) StoreSlots(p, i, fetched.slots.home, fetched.slots.replica, memory);
#pragma unroll 1
  for (int32_t e = i + Threads::Size(); e < p.n_logical; e += Threads::Size()) {
    StoreSlots(p, e, log2phy[e * p.max_replicas], log2phy[e * p.max_replicas + 1], memory);
  }
  if constexpr (kQuotas != Quotas::kGiven) {
    const GroupMemory groups(p, p.n_groups, memory.groups);
    const int32_t edges = p.group_size * p.n_columns;
    if (i < edges) StoreEdge(p, groups, i, fetched.source);
    LoadTopology(p, in.r2o, groups, i + Threads::Size(), Threads::Size());
    for (int32_t g = i; g < p.n_groups; g += Threads::Size()) groups.status[g] = 0;
    FetchHome(p, in, fetched.ahead);
  }
}

// Must be called, and a barrier passed, before ReceiveTotals.
template <Quotas kQuotas>
__device__ __forceinline__ void ForgetInvalid(const Problem& p, const RouteMemory& memory) {
  if constexpr (kQuotas == Quotas::kSynced) {
    if (threadIdx.x == 0) memory.total[p.n_logical] = 0;
  }
}

// Waits for all ranks' counts, of which `total` becomes the sum (−1 where it passes int32) and
// `before` what comes before this rank's tokens. After a failure nothing is routed. The routes'
// slots were stored by the threads that read them here, and ForgetInvalid was called; a barrier
// must follow.
template <typename Threads>
__device__ __forceinline__ void ReceiveTotals(const RouteArguments& a, const SyncCall& call,
                                              bool leader, const RouteMemory& memory) {
  const Problem& p = a.problem;
  bool failed = false;
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
    const PackedRoute route = memory.routes[e];
    const int32_t home = p.by_slots.Quotient(route.home);
    const int32_t replica = p.by_slots.Quotient(route.replica);
    int64_t total = 0;
    int64_t before = 0;
    const auto add = [&](int32_t source, int32_t count) {
      total += count;
      before += ComesBefore(source, a.peers.rank, home, replica) ? count : 0;
    };
    // Of ids that name no expert it only matters whether rank e has any. A turn of their own in
    // this loop would take as long as all others.
    const uint64_t* invalid =
        e < a.peers.size ? a.peers.inbox + call.RowOf(a.peers, e) + p.n_logical : nullptr;
    failed |= !Receive(a.peers, call, e, 0, a.peers.size, leader, add, invalid, [&](int32_t count) {
      if (count != 0) atomicOr(&memory.total[p.n_logical], 1);
    });
    memory.total[e] = total <= kInt32Max ? static_cast<int32_t>(total) : -1;
    memory.before[e] = static_cast<int32_t>(min(before, int64_t{kInt32Max}));
  }
  if (!Threads::Any(failed)) return;
  const GroupMemory groups(p, p.n_groups, memory.groups);
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += Threads::Size()) {
    memory.total[e] = 0;
    memory.own[e] = 0;
  }
  for (int32_t g = threadIdx.x; g < p.n_groups; g += Threads::Size()) {
    groups.status[g] = kSyncFailed;
  }
}

// From the experts' totals to their routes: solves, or takes the quotas that are given. All threads
// of the team call it behind a barrier; another must follow.
template <int kWords, int kColumns, Quotas kQuotas, typename Threads>
__device__ __forceinline__ void MakeRoutes(const RouteArguments& a, const SolveOperands& in,
                                           int64_t element, const Ahead& ahead, bool leader,
                                           const RouteMemory& memory) {
  const Problem& p = a.problem;
  const AssignOperands given = BatchElement(p, a.sources, a.given, element);
  int32_t rank = 0;
  if constexpr (kQuotas != Quotas::kGiven) {
    const Groups groups = {0, p.n_groups};
    const SolveResults out = BatchElement(p, a.solve_out, element);
    const GroupMemory group_memory(p, p.n_groups, memory.groups);
    LoadRanks<Threads>(p, in, groups, ahead, CountedTotals{memory.total}, group_memory);
    CheckAhead(p, groups, ahead, group_memory);
    Threads::Sync();
    SolveGroups<kWords, kColumns, Threads>(p, in, groups, group_memory, memory.quota,
                                           [&](int32_t g, const Proof& proof) {
                                             if (!leader) return;
                                             out.max_load[g] = proof.max_load;
                                             out.lower_bound[g] = proof.lower_bound;
                                           });
    Threads::Sync();
  } else {
    rank = *given.rank;
  }
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
    PackedRoute& packed = memory.routes[e];
    if constexpr (kQuotas == Quotas::kSynced) {
      if (GroupMemory(p, p.n_groups, memory.groups).status[0] & kSyncFailed) {
        packed = {0, kNoSlot, kNoSlot};
      }
    }
    if (packed.home == kNoSlot || packed.replica == kNoSlot) continue;
    if constexpr (kQuotas == Quotas::kSolved) {
      packed.keep = memory.quota[packed.home];  // There is one source.
    } else if constexpr (kQuotas == Quotas::kSynced) {
      packed.keep = max(memory.quota[packed.home] - memory.before[e], 0);
    } else {
      const Route route = {0, packed.home, packed.replica};
      packed.keep = KeepOf(p, a.sources, given.counts, given.quota, rank, a.proportional, e, route);
    }
  }
}

// What the whole batch gets once, each of its `n_blocks` blocks a part of it.
template <Quotas kQuotas, typename Threads>
__device__ __forceinline__ void WriteSummary(const RouteArguments& a, int64_t element,
                                             int32_t block, int32_t n_blocks,
                                             const RouteMemory& memory) {
  const Problem& p = a.problem;
  const int32_t first = block * Threads::Size() + threadIdx.x;
  const int32_t stride = n_blocks * Threads::Size();
  // A slot has one expert, unless the placement contradicts itself: then the first block adds up.
  bool one_each = false;
  if constexpr (kQuotas != Quotas::kGiven) {
    const SolveResults out = BatchElement(p, a.solve_out, element);
    const GroupMemory groups(p, p.n_groups, memory.groups);
    const int32_t invalid = memory.total[p.n_logical] != 0 ? kInvalidIndex : 0;
    int32_t status = 0;
#pragma unroll 1
    for (int32_t g = threadIdx.x & 31; g < p.n_groups; g += 32) status |= groups.status[g];
    one_each = !__any_sync(kFullWarp, status & (kBadPlacement | kSyncFailed));
    // Unrolled, these loops would begin with divisions by the stride.
#pragma unroll 1
    for (int32_t g = first; g < p.n_groups; g += stride) out.status[g] = groups.status[g] | invalid;
#pragma unroll 1
    for (int32_t i = first; i < p.n_physical; i += stride) out.quota[i] = memory.quota[i];
  }
  if (a.tokens.slot_counts == nullptr || (!one_each && block != 0)) return;
  int32_t* out = a.tokens.slot_counts + element * p.n_physical;
  if (!one_each) {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.n_physical; i += Threads::Size()) out[i] = 0;
    Threads::Sync();
  }
#pragma unroll 1
  for (int32_t e = one_each ? first : threadIdx.x; e < p.n_logical;
       e += one_each ? stride : Threads::Size()) {
    const PackedRoute route = memory.routes[e];
    const int32_t stays = min(route.keep, memory.own[e]);
    const int32_t leaves = memory.own[e] - stays;
    if (one_each) {
      out[route.home] = stays;
      if (route.replica != kNoSlot) out[route.replica] = leaves;
    } else {
      if (route.home != kNoSlot) atomicAdd(&out[route.home], stays);
      if (route.replica != kNoSlot) atomicAdd(&out[route.replica], leaves);
    }
  }
}

// Writes the slot, and the position in its list, of token `i`, which has this ordinal among all
// tokens of `expert` (−1: none).
__device__ __forceinline__ void WriteToken(const TokenBuffers& tokens, int64_t i, int32_t expert,
                                           int32_t ordinal, const PackedRoute* routes) {
  int32_t slot = -1;
  int32_t position = -1;
  if (expert >= 0) {
    const PackedRoute route = routes[expert];
    const bool stays = ordinal < route.keep;
    const int32_t packed = stays ? route.home : route.replica;
    if (packed != kNoSlot) {
      slot = packed;
      position = stays ? ordinal : ordinal - route.keep;
    }
  }
  tokens.physical[i] = slot;
  if (tokens.position != nullptr) tokens.position[i] = position;
}

// This element's tokens.
__device__ __forceinline__ TokenBuffers TokensOf(const RouteArguments& a, int64_t element) {
  TokenBuffers tokens = a.tokens;
  const int64_t first = element * tokens.n_tokens;
  tokens.indices = static_cast<const char*>(tokens.indices) + first * IndexBytes(tokens.type);
  tokens.physical += first;
  if (tokens.position != nullptr) tokens.position += first;
  return tokens;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The numbers of ClusterKernel's barriers besides that of Team. Of the first two, which all threads
// of a block reach, some threads wait for what the others announce.
enum class Event { kCleared = 2, kCounted = 3 };
constexpr int kTokenBarrier = 4;  // of the threads that hold tokens

template <Event kEvent>
__device__ __forceinline__ void Announce() {
  asm volatile("bar.arrive %0, %1;" ::"n"(static_cast<int>(kEvent)), "r"(blockDim.x) : "memory");
}

template <Event kEvent>
__device__ __forceinline__ void Await() {
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(kEvent)), "r"(blockDim.x) : "memory");
}

// Sends the block's counts to every block of the cluster, itself included.
__device__ __forceinline__ void SendCounts(int32_t row, int32_t n_blocks, int32_t block,
                                           const RouteMemory& memory) {
  // A thread packs some counts and sends them to every n-th block.
  const int32_t width_log2 = row <= 64 * RouteMemory::kPacked ? 6 : 8;
  const int32_t first = threadIdx.x & ((1 << width_log2) - 1);
#pragma unroll 1
  for (int32_t e = first * RouteMemory::kPacked; e < row; e += RouteMemory::kPacked << width_log2) {
    const int4 low = *reinterpret_cast<const int4*>(memory.counts + e);
    const int4 high = *reinterpret_cast<const int4*>(memory.counts + e + 4);
    // A block has less than 2¹⁶ tokens.
    const uint4 packed = {
        static_cast<uint32_t>(low.x | low.y << 16), static_cast<uint32_t>(low.z | low.w << 16),
        static_cast<uint32_t>(high.x | high.y << 16), static_cast<uint32_t>(high.z | high.w << 16)};
#pragma unroll 4
    for (int32_t to = threadIdx.x >> width_log2; to < n_blocks; to += kPlanThreads >> width_log2) {
      SendTo(to, memory.incoming + block * row + e, packed, memory.arrivals);
    }
  }
  if (threadIdx.x == 0) {
    ExpectBytes(memory.arrivals, n_blocks * row * static_cast<int32_t>(sizeof(uint16_t)));
  }
}

// Sums what the blocks have sent: two experts a thread. Calls `emit(e, total of e, of e + 1)`.
template <typename Emit>
__device__ __forceinline__ void SumCounts(int32_t row, int32_t n_blocks, int32_t block,
                                          const RouteMemory& memory, const Emit& emit) {
  const auto* incoming = reinterpret_cast<const uint32_t*>(memory.incoming);
  // All counts of a pair are on their way together.
  const auto sum = [&](auto most) {
    constexpr int kMost = decltype(most)::value;
#pragma unroll 1
    for (int32_t e = 2 * threadIdx.x; e < row; e += 2 * kPlanThreads) {
      uint32_t pair[kMost];
#pragma unroll
      for (int b = 0; b < kMost; ++b) pair[b] = b < n_blocks ? incoming[(b * row + e) / 2] : 0;
      int2 total = {0, 0};
      int2 earlier = {0, 0};
#pragma unroll
      for (int b = 0; b < kMost; ++b) {
        const int32_t low = static_cast<int32_t>(pair[b] & 0xffff);
        const int32_t high = static_cast<int32_t>(pair[b] >> 16);
        total = {total.x + low, total.y + high};
        if (b < block) earlier = {earlier.x + low, earlier.y + high};
      }
      *reinterpret_cast<int2*>(memory.own + e) = total;
      *reinterpret_cast<int2*>(memory.earlier + e) = earlier;
      emit(e, total);
    }
  };
  if (n_blocks <= 4) {
    sum(std::integral_constant<int, 4>());
  } else if (n_blocks <= 8) {
    sum(std::integral_constant<int, 8>());
  } else {
    sum(std::integral_constant<int, 16>());
  }
}

// What the planning threads of a block of ClusterKernel do: they share the counts with the other
// blocks, and with kSynced the other ranks, and make the routes.
template <int kWords, int kColumns, Quotas kQuotas>
__device__ __forceinline__ void PlanRoutes(const RouteArguments& a, int64_t element,
                                           const RouteMemory& memory) {
  using Threads = Team<kPlanThreads>;
  const auto cluster = cooperative_groups::this_cluster();
  const Problem& p = a.problem;
  const int32_t n_blocks = cluster.num_blocks();
  const int32_t block = cluster.block_rank();
  const int32_t row = RouteMemory::Row(p);
  if (threadIdx.x == 0) InitArrivals(memory.arrivals);
  ForgetInvalid<kQuotas>(p, memory);
  AnnounceStart();
  const SolveOperands in = BatchElement(p, a.sources, a.solve_in, element);
  const int32_t* log2phy =
      kQuotas != Quotas::kGiven ? in.log2phy : BatchElement(p, a.sources, a.given, element).log2phy;
  Prefetched fetched = Prefetch<kQuotas, Threads>(a, in, log2phy);
  SyncCall call;
  uint64_t* inbox;  // of the first rank that this block sends to
  if constexpr (kQuotas == Quotas::kSynced) {
    inbox = a.peers.inboxes[min(block, a.peers.size - 1)];
    call = BeginSync(a.peers, a.peers.state->epoch + 1, *a.given.rank, block == 0);
  }
  int4* counts = reinterpret_cast<int4*>(memory.counts);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < row / 4; i += kPlanThreads) counts[i] = {0, 0, 0, 0};
  Announce<Event::kCleared>();
  StorePrefetched<kQuotas, Threads>(a, in, log2phy, fetched, memory);
  AwaitStarts();

  Await<Event::kCounted>();
  SendCounts(row, n_blocks, block, memory);
  AwaitBytes(memory.arrivals);
  SumCounts(row, n_blocks, block, memory, [&](int32_t e, int2 total) {
    if constexpr (kQuotas == Quotas::kSynced) {
      for (int32_t peer = block; peer < a.peers.size; peer += n_blocks) {
        uint64_t* to = peer == block ? inbox : a.peers.inboxes[peer];
        if (e <= p.n_logical) Send(a.peers, call, to, e, total.x);
        if (e < p.n_logical) Send(a.peers, call, to, e + 1, total.y);
      }
    }
  });
  if constexpr (kQuotas == Quotas::kSynced) {
    ReceiveTotals<Threads>(a, call, block == 0, memory);
    if (block == 0 && threadIdx.x == 0) a.peers.state->epoch = call.epoch;  // All have read it.
  }
  Threads::Sync();
  MakeRoutes<kWords, kColumns, kQuotas, Threads>(a, in, element, fetched.ahead, block == 0, memory);
  // Orders nothing that the block's barrier after it does not; but without it, compute-sanitizer's
  // racecheck reports the routes' stores (2025.3). It takes 0.02 µs.
  Threads::Sync();
}

// The tokens of a thread of ClusterKernel, which holds every 32nd of its warp's.
struct HeldTokens {
  int64_t first;
  // The expert, n_logical for an invalid id, −1 for none; later the expert and, in the upper half,
  // the ordinal among its tokens in the block: both are less than 2¹⁵.
  int32_t code[kMaxRounds];
};

// What the threads that hold tokens do: they count them, a.rounds each, and then, while the routes
// are made, find every token's ordinal in the block.
__device__ __forceinline__ void FindOrdinals(const RouteArguments& a, const TokenBuffers& tokens,
                                             const RouteMemory& memory, HeldTokens& held) {
  const Problem& p = a.problem;
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kPlanThreads;
  const int32_t n_threads = static_cast<int32_t>(blockDim.x) - kPlanThreads;
  const int32_t warp = thread / 32;
  const int32_t n_warps = n_threads / 32;
  const auto sync = [&] {
    asm volatile("bar.sync %0, %1;" ::"n"(kTokenBarrier), "r"(n_threads) : "memory");
  };
  AnnounceStart();
  const int32_t block = cooperative_groups::this_cluster().block_rank();
  const int64_t first =
      static_cast<int64_t>(block * n_warps + warp) * 32 * a.rounds + (thread & 31);
  int32_t (&code)[kMaxRounds] = held.code;
  held.first = first;
  WithIndices(tokens, [&](auto* indices) {
    // All loads are on their way before the first is looked at.
    std::decay_t<decltype(*indices)> id[kMaxRounds];
#pragma unroll
    for (int j = 0; j < kMaxRounds; ++j) {
      const int64_t i = first + 32 * j;
      if (j < a.rounds && i < tokens.n_tokens) id[j] = indices[i];
    }
    int4* pairs = reinterpret_cast<int4*>(memory.cells);  // There is an even number of warps.
    const int32_t n_pairs = n_warps * (p.n_logical + RouteMemory::kPad) / 2;
#pragma unroll 1
    for (int32_t i = thread; i < n_pairs; i += n_threads) pairs[i] = {0, 0, 0, 0};
    Await<Event::kCleared>();
#pragma unroll
    for (int j = 0; j < kMaxRounds; ++j) {
      if (j >= a.rounds) break;
      code[j] = first + 32 * j < tokens.n_tokens ? ExpertOf(id[j], p.n_logical) : -1;
      if (code[j] >= 0) atomicAdd(&memory.counts[code[j]], 1);
    }
  });
  Announce<Event::kCounted>();

  Cell* cells = memory.CellsOf(p, warp);
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    if (j >= a.rounds) break;
    const int32_t expert = code[j] == p.n_logical ? -1 : code[j];
    const int32_t ordinal = Rank(expert, cells);
    code[j] = expert < 0 ? -1 : expert | ordinal << 16;
  }
  sync();
  ScanWarps(p.n_logical, warp, n_warps, &memory.cells[0].count,
            2 * (p.n_logical + RouteMemory::kPad), 2, [](int32_t, int32_t) {});
  sync();
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    if (j >= a.rounds) break;
    if (code[j] >= 0) code[j] += static_cast<int32_t>(cells[code[j] & 0xffff].count << 16);
  }
  AwaitStarts();  // Long past, but every arrival needs its wait.
}

// One cluster per batch element. The routes need the tokens' counts only, not their ordinals, so
// the first kPlanThreads threads of a block make the routes while the others find the ordinals.
template <int kWords, int kColumns, Quotas kQuotas>
__global__ void __launch_bounds__(kPlanThreads + kRouteThreads, 1)
    ClusterKernel(const RouteArguments a) {
  extern __shared__ int4 shared[];
  const auto cluster = cooperative_groups::this_cluster();
  const int32_t n_blocks = cluster.num_blocks();
  const int32_t n_warps = (static_cast<int32_t>(blockDim.x) - kPlanThreads) / 32;
  const RouteMemory memory(a.problem, n_warps, n_blocks, kQuotas, shared);
  // With other ranks there is a batch of one.
  const int64_t element = kQuotas == Quotas::kSynced ? 0 : __clusterIdx().x;
  const bool plans = threadIdx.x < kPlanThreads;
  const TokenBuffers tokens = TokensOf(a, element);
  HeldTokens held;
  if (plans) {
    PlanRoutes<kWords, kColumns, kQuotas>(a, element, memory);
  } else {
    FindOrdinals(a, tokens, memory, held);
  }
  __syncthreads();
  if (plans) {
    WriteSummary<kQuotas, Team<kPlanThreads>>(a, element, cluster.block_rank(), n_blocks, memory);
    return;
  }
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    const int64_t i = held.first + 32 * j;
    if (j >= a.rounds || i >= tokens.n_tokens) break;
    const int32_t code = held.code[j];
    const int32_t expert = code < 0 ? -1 : code & 0xffff;
    const int32_t ordinal = expert < 0 ? 0 : memory.earlier[expert] + (code >> 16);
    WriteToken(tokens, i, expert, ordinal, memory.routes);
  }
}
#else
template <int kWords, int kColumns, Quotas kQuotas>
__global__ void ClusterKernel(const RouteArguments) {}
#endif

// The tokens of a warp of a tile: [begin, end).
struct Span {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ Span SpanOf(const RouteArguments& a, int32_t tile) {
  const int32_t n_warps = blockDim.x / 32;
  const int64_t warp = static_cast<int64_t>(tile) * n_warps + threadIdx.x / 32;
  const int64_t begin = min(warp * a.tokens_per_warp, a.tokens.n_tokens);
  return {begin, min(begin + a.tokens_per_warp, a.tokens.n_tokens)};
}

// A tile's part of the workspace: its histogram [n_logical + 1], then for every warp the sums of
// the warps before, [n_warps, n_logical].
__device__ __forceinline__ int32_t* TileOf(const RouteArguments& a, int64_t element, int32_t tile) {
  return a.workspace + (element * a.n_tiles + tile) * a.workspace_words;
}

// With kSynced, the last block to finish sends the rank's totals to its peers.
template <Quotas kQuotas>
__global__ void __launch_bounds__(kRouteThreads) TileCountKernel(const RouteArguments a) {
  extern __shared__ uint32_t counts[];  // [n_warps, n_logical + 1]
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();  // TileRouteKernel may start; it waits for our end.
#endif
  const Problem& p = a.problem;
  const int64_t element = blockIdx.x;
  const int32_t tile = blockIdx.y;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t row = p.n_logical + 1;
  const TokenBuffers tokens = TokensOf(a, element);
  for (int32_t i = threadIdx.x; i < n_warps * row; i += blockDim.x) counts[i] = 0;
  __syncthreads();

  uint32_t* mine = counts + threadIdx.x / 32 * row;
  const Span span = SpanOf(a, tile);
  bool invalid = false;
  WithIndices(tokens, [&](auto* indices) {
#pragma unroll 1
    for (int64_t first = span.begin + (threadIdx.x & 31); first < span.end; first += 32 * kAtOnce) {
      std::decay_t<decltype(*indices)> id[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + 32 * j < span.end) id[j] = indices[first + 32 * j];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + 32 * j >= span.end) break;
        const int32_t expert = ExpertOf(id[j], p.n_logical);
        invalid |= expert == p.n_logical;
        if (expert >= 0 && expert < p.n_logical) atomicAdd(&mine[expert], 1u);
      }
    }
  });
  invalid = __syncthreads_or(invalid);
  int32_t* out = TileOf(a, element, tile);
  ScanWarps(p.n_logical, threadIdx.x / 32, n_warps, counts, row, 1,
            [&](int32_t expert, int32_t total) { out[expert] = total; });
  if (threadIdx.x == 0) out[p.n_logical] = invalid;
  __syncthreads();
  for (int32_t w = 0; w < n_warps; ++w) {
    for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
      out[row + w * p.n_logical + e] = static_cast<int32_t>(counts[w * row + e]);
    }
  }
  if constexpr (kQuotas == Quotas::kSynced) {
    SyncState& state = *a.peers.state;
    __threadfence();
    __syncthreads();
    const bool last = threadIdx.x == 0 && atomicAdd(&state.ticket, 1) + 1 == gridDim.y;
    if (!__syncthreads_or(last)) return;
    __threadfence();
    const SyncCall call = {state.epoch + 1, false};
    for (int32_t e = threadIdx.x; e < row; e += blockDim.x) {
      int32_t total = 0;
#pragma unroll 8
      for (int32_t t = 0; t < a.n_tiles; ++t) total += __ldcg(&TileOf(a, element, t)[e]);
      for (int32_t peer = 0; peer < a.peers.size; ++peer) {
        Send(a.peers, call, a.peers.inboxes[peer], e, total);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      state.epoch = call.epoch;
      state.ticket = 0;
    }
  }
}

template <int kWords, int kColumns, Quotas kQuotas>
__global__ void __launch_bounds__(kRouteThreads, 2) TileRouteKernel(const RouteArguments a) {
  extern __shared__ int4 shared[];
  const Problem& p = a.problem;
  const int64_t element = blockIdx.x;
  const int32_t tile = blockIdx.y;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t row = p.n_logical + 1;
  const RouteMemory memory(p, n_warps, 0, kQuotas, shared);
  const TokenBuffers tokens = TokensOf(a, element);
  const SolveOperands in = BatchElement(p, a.sources, a.solve_in, element);
  const int32_t* log2phy =
      kQuotas != Quotas::kGiven ? in.log2phy : BatchElement(p, a.sources, a.given, element).log2phy;

  Prefetched fetched = Prefetch<kQuotas, Block>(a, in, log2phy);
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += blockDim.x) {
    memory.own[e] = 0;
    if (e < p.n_logical) memory.earlier[e] = 0;
  }
  ForgetInvalid<kQuotas>(p, memory);
  StorePrefetched<kQuotas, Block>(a, in, log2phy, fetched, memory);
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // From here on the tiles' counts are there.
#endif
  __syncthreads();
  // Each part of the threads sums every n_parts-th tile.
  const int32_t width = (row + 31) / 32 * 32;
  const int32_t n_parts = max(static_cast<int32_t>(blockDim.x) / width, 1);
  const int32_t part = static_cast<int32_t>(threadIdx.x) / width;
  for (int32_t e = threadIdx.x - (n_parts > 1 ? part * width : 0); e < row; e += blockDim.x) {
    if (n_parts > 1 && part >= n_parts) break;
    int32_t total = 0;
    int32_t earlier = 0;
#pragma unroll 8
    for (int32_t t = n_parts > 1 ? part : 0; t < a.n_tiles; t += n_parts) {
      const int32_t count = TileOf(a, element, t)[e];
      total += count;
      earlier += t < tile ? count : 0;
    }
    atomicAdd(&memory.own[e], total);
    if (e < p.n_logical) atomicAdd(&memory.earlier[e], earlier);
  }
  __syncthreads();
  if constexpr (kQuotas == Quotas::kSynced) {
    const SyncCall call =
        BeginSync(a.peers, __ldcg(&a.peers.state->epoch), *a.given.rank, tile == 0);
    ReceiveTotals<Block>(a, call, tile == 0, memory);
    __syncthreads();
  }
  // From here on a cell counts from the batch's first token.
  const int32_t* warps_before = TileOf(a, element, tile) + row;
  for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
    const int32_t earlier = memory.earlier[e];
#pragma unroll 8
    for (int32_t w = 0; w < n_warps; ++w) {
      memory.CellsOf(p, w)[e] = {
          0, static_cast<uint32_t>(earlier + warps_before[w * p.n_logical + e])};
    }
  }
  MakeRoutes<kWords, kColumns, kQuotas, Block>(a, in, element, fetched.ahead, tile == 0, memory);
  __syncthreads();

  Cell* cells = memory.CellsOf(p, threadIdx.x / 32);
  const Span span = SpanOf(a, tile);
  WithIndices(tokens, [&](auto* indices) {
  // All lanes stay in the loop for Rank.
#pragma unroll 1
    for (int64_t begin = span.begin; begin < span.end; begin += 32 * kAtOnce) {
      std::decay_t<decltype(*indices)> id[kAtOnce];
      const int64_t first = begin + (threadIdx.x & 31);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + 32 * j < span.end) id[j] = indices[first + 32 * j];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + 32 * j >= span.end) break;
        const int64_t i = first + 32 * j;
        int32_t expert = i < span.end ? ExpertOf(id[j], p.n_logical) : -1;
        if (expert == p.n_logical) expert = -1;
        const int32_t ordinal = Rank(expert, cells);
        if (i < span.end) WriteToken(tokens, i, expert, ordinal, memory.routes);
      }
    }
  });
  WriteSummary<kQuotas, Block>(a, element, tile, a.n_tiles, memory);
}

// How the kernels are launched.
struct RouteShape {
  int32_t cluster;  // blocks of a cluster; 0: tiles
  int32_t threads;
  int32_t rounds;
};

RouteShape ChooseShape(const RouteArguments& arguments);
bool HasClusters();
cudaError_t AllowSharedMemory(const void* kernel, int32_t bytes, bool large_cluster);

// Launches the kernels for a.batch elements.
template <int kWords, int kColumns, Quotas kQuotas>
cudaError_t LaunchRoute(RouteArguments a, cudaStream_t stream) {
  const RouteShape shape = ChooseShape(a);
  const int32_t n_warps = shape.threads / 32;
  const int32_t bytes = RouteMemory::Bytes(a.problem, n_warps, shape.cluster, kQuotas);
  cudaError_t error;
  if (shape.cluster > 0) {
    const auto kernel = ClusterKernel<kWords, kColumns, kQuotas>;
    error = AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes, shape.cluster > 8);
    if (error != cudaSuccess) return error;
    a.rounds = shape.rounds;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(a.batch * shape.cluster));
    config.blockDim = dim3(kPlanThreads + shape.threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, a);
  }
  const auto kernel = TileRouteKernel<kWords, kColumns, kQuotas>;
  const auto count_kernel = TileCountKernel<kQuotas>;
  const int32_t count_bytes = 4 * n_warps * (a.problem.n_logical + 1);
  error = AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes, false);
  if (error != cudaSuccess) return error;
  error = AllowSharedMemory(reinterpret_cast<const void*>(count_kernel), count_bytes, false);
  if (error != cudaSuccess) return error;
  const int64_t warps = static_cast<int64_t>(a.n_tiles) * n_warps;
  a.tokens_per_warp = ((a.tokens.n_tokens + warps - 1) / warps + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(a.batch), a.n_tiles);
  count_kernel<<<grid, shape.threads, count_bytes, stream>>>(a);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  // Where the chip can, the second kernel starts beside the first and waits for it on the device.
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = HasClusters() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_CUH_
