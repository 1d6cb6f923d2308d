// From the experts' totals to their routes, by the threads of a team. Prefetches and stores
// everything that does not depend on totals, waits for the totals of other ranks if there are any,
// then solves or takes the given quotas.
#ifndef LPLB_CUDA_ROUTE_PLAN_CUH_
#define LPLB_CUDA_ROUTE_PLAN_CUH_

#include "cuda/route/tables.cuh"
#include "cuda/solver.cuh"
#include "cuda/sync.cuh"
#include "cuda/team.cuh"

namespace lplb::cuda {

// What the threads that make the routes fetch ahead, so that the latencies overlap.
struct Prefetched {
  PrefetchedSlot slot;  // its home is fetched later
  int32_t source;       // this thread's edge of r2o
  int32_t held;         // the expert in this thread's slot
  Route slots;          // of this thread's expert
};

// The placement of a batch element, from whichever operands hold it.
struct Tables {
  const int32_t* phy2log;
  const int32_t* log2phy;
};

template <Quotas kQuotas>
__device__ __forceinline__ Tables TablesOf(const RouteArguments& a, const SolveOperands& in,
                                           int64_t element) {
  if constexpr (kQuotas != Quotas::kGiven) return {in.phy2log, in.log2phy};
  const AssignOperands given = BatchElement(a.problem, a.sources, a.given, element);
  return {given.phy2log, given.log2phy};
}

template <Quotas kQuotas, typename Threads>
__device__ __forceinline__ Prefetched Prefetch(const RouteArguments& a, const SolveOperands& in,
                                               const Tables& tables) {
  const Problem& p = a.problem;
  const int32_t i = threadIdx.x;
  Prefetched fetched = {{-1, 0, -1, -1}, 0, -1, {0, -1, -1}};
  if constexpr (kQuotas != Quotas::kGiven) {
    fetched.slot = PrefetchSlot<Threads>(p, in, {0, p.n_groups});
    if (i < p.group_size * p.n_columns) fetched.source = in.r2o[i];
  }
  if constexpr (kQuotas == Quotas::kGiven) {
    if (i < p.n_physical) fetched.held = tables.phy2log[i];
  }
  if (i < p.n_logical) {
    fetched.slots.home = tables.log2phy[i * p.max_replicas];
    fetched.slots.replica = tables.log2phy[i * p.max_replicas + 1];
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

// Stores what was fetched in shared memory, and loads the rest where there is more than one item
// per thread.
template <Quotas kQuotas, typename Threads>
__device__ __forceinline__ void StorePrefetched(const RouteArguments& a, const SolveOperands& in,
                                                const Tables& tables, Prefetched& fetched,
                                                const RouteMemory& memory) {
  const Problem& p = a.problem;
  const int32_t i = threadIdx.x;
  if (i < p.n_logical) StoreSlots(p, i, fetched.slots.home, fetched.slots.replica, memory);
#pragma unroll 1
  for (int32_t e = i + Threads::Size(); e < p.n_logical; e += Threads::Size()) {
    const int32_t* slots = tables.log2phy + e * p.max_replicas;
    StoreSlots(p, e, slots[0], slots[1], memory);
  }
  if constexpr (kQuotas == Quotas::kGiven) {
    if (i < p.n_physical) memory.held[i] = fetched.held;
#pragma unroll 1
    for (int32_t s = i + Threads::Size(); s < p.n_physical; s += Threads::Size()) {
      memory.held[s] = tables.phy2log[s];
    }
  }
  if constexpr (kQuotas != Quotas::kGiven) {
    const GroupMemory groups(p, p.n_groups, memory.groups);
    const int32_t edges = p.group_size * p.n_columns;
    if (i < edges) StoreEdge(p, groups, i, fetched.source);
    LoadTopology(p, in.r2o, groups, i + Threads::Size(), Threads::Size());
    for (int32_t g = i; g < p.n_groups; g += Threads::Size()) groups.status[g] = 0;
    FetchHome(p, in, fetched.slot);
  }
}

// Must be called, followed by a barrier, before ReceiveTotals.
template <Quotas kQuotas>
__device__ __forceinline__ void ForgetInvalid(const Problem& p, const RouteMemory& memory) {
  if constexpr (kQuotas == Quotas::kSynced) {
    if (threadIdx.x == 0) memory.total[p.n_logical] = 0;
  }
}

// Waits for all ranks' counts and stores their sum in `total`, or −1 if it exceeds int32. Calls
// `use(e, source, count)` for each count and `done(e)` after an expert's last. Returns whether some
// counts did not arrive in time; there are no tokens then. ForgetInvalid must have been called, and
// a barrier must follow.
template <typename Threads, typename Use, typename Done>
__device__ __forceinline__ bool AwaitTotals(const RouteArguments& a, const SyncCall& call,
                                            bool leader, const RouteMemory& memory, const Use& use,
                                            const Done& done) {
  const Problem& p = a.problem;
  bool failed = false;
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += Threads::Size()) {
    int64_t total = 0;
    const auto add = [&](int32_t source, int32_t count) {
      total += count;
      use(e, source, count);
    };
    // For ids that name no expert, it only matters whether rank e has any. An iteration of their
    // own in this loop would take as long as all others together.
    const uint64_t* invalid =
        e < a.peers.size ? a.peers.inbox + call.RowOf(a.peers, e) + p.n_logical : nullptr;
    failed |= !Receive(a.peers, call, e, 0, a.peers.size, leader, add, invalid, [&](int32_t count) {
      if (count != 0) atomicOr(&memory.total[p.n_logical], 1);
    });
    memory.total[e] = total <= kInt32Max ? static_cast<int32_t>(total) : -1;
    done(e);
  }
  if (!Threads::Any(failed)) return false;
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += Threads::Size()) {
    memory.total[e] = 0;
    memory.own[e] = 0;
  }
  return true;
}

// AwaitTotals, which also sets `before` to the tokens that come before this rank's. After a failure
// nothing is routed. Each thread reads here only the routes' slots that it stored itself.
template <typename Threads>
__device__ __forceinline__ void ReceiveTotals(const RouteArguments& a, const SyncCall& call,
                                              bool leader, const RouteMemory& memory) {
  const Problem& p = a.problem;
  int64_t before = 0;
  const bool failed = AwaitTotals<Threads>(
      a, call, leader, memory,
      [&](int32_t e, int32_t source, int32_t count) {
        const int32_t home = p.by_slots.Quotient(memory.routes[e].home);
        const int32_t replica = p.by_slots.Quotient(memory.routes[e].replica);
        before += ComesBefore(source, a.peers.rank, home, replica) ? count : 0;
      },
      [&](int32_t e) {
        memory.before[e] = static_cast<int32_t>(min(before, int64_t{kInt32Max}));
        before = 0;
      });
  if (!failed) return;
  const GroupMemory groups(p, p.n_groups, memory.groups);
  for (int32_t g = threadIdx.x; g < p.n_groups; g += Threads::Size()) {
    groups.status[g] = kSyncFailed;
  }
}

// Drops slots that log2phy gives to an expert but phy2log to another.
__device__ __forceinline__ void KeepOwnSlots(const int32_t* phy2log, int32_t expert,
                                             PackedRoute& route) {
  if (route.home != kNoSlot && phy2log[route.home] != expert) route.home = kNoSlot;
  if (route.replica != kNoSlot && phy2log[route.replica] != expert) route.replica = kNoSlot;
}

// From the experts' totals to their routes: solves, or takes the given quotas. All threads of the
// team call it after a barrier, and another barrier must follow.
template <int kWords, int kColumns, Quotas kQuotas, typename Threads>
__device__ __forceinline__ void MakeRoutes(const RouteArguments& a, const SolveOperands& in,
                                           int64_t element, const PrefetchedSlot& fetched,
                                           bool leader, const RouteMemory& memory) {
  const Problem& p = a.problem;
  const AssignOperands given = BatchElement(p, a.sources, a.given, element);
  int32_t rank = 0;
  bool misplaced = false;
  if constexpr (kQuotas != Quotas::kGiven) {
    const Groups groups = {0, p.n_groups};
    const SolveResults out = BatchElement(p, a.solve_out, element);
    const GroupMemory group_memory(p, p.n_groups, memory.groups);
    LoadRanks<Threads>(p, in, groups, fetched, CountedTotals{memory.total}, group_memory);
    bool right = CheckPrefetched(p, groups, fetched, group_memory);
    Threads::Sync();
    right &= SolveGroups<kWords, kColumns, Threads>(p, in, groups, group_memory, memory.quota,
                                                    [&](int32_t g, const Proof& proof) {
                                                      if (!leader) return;
                                                      out.max_load[g] = proof.max_load;
                                                      out.lower_bound[g] = proof.lower_bound;
                                                    });
    misplaced = Threads::Any(!right);  // Otherwise every slot is its expert's own.
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
    if constexpr (kQuotas == Quotas::kGiven) {
      KeepOwnSlots(memory.held, e, packed);
    } else {
      if (misplaced) KeepOwnSlots(in.phy2log, e, packed);
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

// Writes the results that a batch element has once. Each of its `n_blocks` blocks writes a part.
template <Quotas kQuotas, typename Threads>
__device__ __forceinline__ void WriteSummary(const RouteArguments& a, int64_t element,
                                             int32_t block, int32_t n_blocks,
                                             const RouteMemory& memory) {
  const Problem& p = a.problem;
  const int32_t first = block * Threads::Size() + threadIdx.x;
  const int32_t stride = n_blocks * Threads::Size();
  // Each slot has one expert, unless the placement contradicts itself. Then the first block adds
  // up.
  bool one_each = false;
  if constexpr (kQuotas != Quotas::kGiven) {
    const SolveResults out = BatchElement(p, a.solve_out, element);
    const GroupMemory groups(p, p.n_groups, memory.groups);
    const int32_t invalid = memory.total[p.n_logical] != 0 ? kInvalidIndex : 0;
    int32_t status = 0;
#pragma unroll 1
    for (int32_t g = threadIdx.x & 31; g < p.n_groups; g += 32) status |= groups.status[g];
    one_each = !__any_sync(kFullWarp, status & (kBadPlacement | kSyncFailed));
    // If unrolled, these loops would begin with divisions by the stride.
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

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_PLAN_CUH_
