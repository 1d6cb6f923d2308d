// For batches that fit in the registers of one thread-block cluster: count, solve and assign in one
// launch.
#ifndef LPLB_CUDA_ROUTE_CLUSTER_KERNEL_CUH_
#define LPLB_CUDA_ROUTE_CLUSTER_KERNEL_CUH_

#include <cooperative_groups.h>

#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/route/routing.cuh"
#include "cuda/route/tokens.cuh"

namespace lplb::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// The ids of ClusterKernel's named barriers besides Team's.
constexpr int kCleared = 2;       // of all threads: some wait for what the others announce
constexpr int kTokenBarrier = 4;  // of the threads that hold tokens

// Sends the block's counts to every block of the cluster, including itself. `thread` is one of
// n_threads that do it, 64 at least.
__device__ __forceinline__ void SendCounts(int32_t row, int32_t n_blocks, int32_t block,
                                           int32_t thread, int32_t n_threads,
                                           const RouteMemory& memory) {
  // A thread packs some counts and sends them to every n-th block.
  const int32_t width_log2 = row <= 64 * RouteMemory::kPacked || n_threads < 256 ? 6 : 8;
  const int32_t first = thread & ((1 << width_log2) - 1);
  const int32_t part = thread >> width_log2;
  const int32_t n_parts = n_threads >> width_log2;
#pragma unroll 1
  for (int32_t e = first * RouteMemory::kPacked; e < row; e += RouteMemory::kPacked << width_log2) {
    const int4 low = *reinterpret_cast<const int4*>(memory.counts + e);
    const int4 high = *reinterpret_cast<const int4*>(memory.counts + e + 4);
    // A block has fewer than 2¹⁶ tokens.
    const uint4 packed = {
        static_cast<uint32_t>(low.x | low.y << 16), static_cast<uint32_t>(low.z | low.w << 16),
        static_cast<uint32_t>(high.x | high.y << 16), static_cast<uint32_t>(high.z | high.w << 16)};
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int32_t first_to = part < n_parts ? part : n_blocks; first_to < n_blocks;
         first_to += kAtOnce * n_parts) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int32_t to = first_to + j * n_parts;
        if (to < n_blocks) SendTo(to, memory.incoming + block * row + e, packed, memory.arrivals);
      }
    }
  }
}

// Adds both halves of a word.
__device__ __forceinline__ int2 AddHalves(uint32_t halves, int2 sum) {
  return {static_cast<int32_t>(__dp2a_lo(halves, 0x0001u, static_cast<uint32_t>(sum.x))),
          static_cast<int32_t>(__dp2a_lo(halves, 0x0100u, static_cast<uint32_t>(sum.y)))};
}

// Sums what the blocks have sent, two experts per thread. Calls `emit(e, totals of e and e + 1)`.
// A block has so few tokens that halves of a word can sum up those of four.
template <typename Threads, typename Emit>
__device__ __forceinline__ void SumCounts(int32_t row, int32_t n_blocks, int32_t block,
                                          const RouteMemory& memory, const Emit& emit) {
  const auto* incoming = reinterpret_cast<const uint32_t*>(memory.incoming);
  constexpr int kFew = 4;
  static_assert(kFew * kMaxRounds * kRouteThreads < 1 << 16);
  // All counts of a pair are in flight together. n_blocks is a power of two.
  const auto sum = [&](auto most) {
    constexpr int kMost = decltype(most)::value;
#pragma unroll 1
    for (int32_t e = 2 * threadIdx.x; e < row; e += 2 * Threads::Size()) {
      uint32_t pair[kMost];
#pragma unroll
      for (int b = 0; b < kMost; ++b) {
        pair[b] = kMost > kFew || b < n_blocks ? incoming[(b * row + e) / 2] : 0;
      }
      int2 total = {0, 0};
      int2 earlier = {0, 0};
#pragma unroll
      for (int first = 0; first < kMost; first += kFew) {
        uint32_t few = 0;
        uint32_t earlier_few = 0;
#pragma unroll
        for (int b = first; b < first + kFew; ++b) {
          few += pair[b];
          earlier_few += b < block ? pair[b] : 0;
        }
        total = AddHalves(few, total);
        earlier = AddHalves(earlier_few, earlier);
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

// The work of a block's planning threads in ClusterKernel: they sum the counts of all blocks and,
// with kSynced, of all ranks, and make the routes.
template <typename Routing, Quotas kQuotas>
__device__ __forceinline__ void PlanRoutes(const RouteArguments& a, int64_t element,
                                           const RouteMemory& memory) {
  using Threads = Team<Routing::kPlanThreads>;
  const Problem& p = a.problem;
  const int32_t n_blocks = a.cluster;
  const int32_t block = cooperative_groups::this_cluster().block_rank();
  const int32_t row = RouteMemory::Row(p);
  if (threadIdx.x == 0) InitArrivals(memory.arrivals);
  if constexpr (Routing::kChooses) {
    if (threadIdx.x == 0) Routing::Begin(a, n_blocks, memory);
  }
  ForgetInvalid<kQuotas>(p, memory);
  AnnounceStart();
  const SolveOperands in = BatchElement(p, a.sources, a.solve_in, element);
  const Tables tables = TablesOf<kQuotas>(a, in, element);
  auto fetched = Routing::template Prefetch<kQuotas, Threads>(a, in, element, tables);
  SyncCall call = {};
  uint64_t* inbox;  // of the first rank to which this block sends
  if constexpr (kQuotas == Quotas::kSynced) {
    inbox = a.peers.inboxes[min(block, a.peers.size - 1)];
    call = BeginSync(a.peers, a.peers.state->epoch + 1, *a.given.rank, block == 0);
  }
  int4* counts = reinterpret_cast<int4*>(memory.counts);
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < row / 4; i += Threads::Size()) counts[i] = {0, 0, 0, 0};
  asm volatile("bar.arrive %0, %1;" ::"n"(kCleared), "r"(blockDim.x) : "memory");
  Routing::template Store<kQuotas, Threads>(a, in, element, tables, fetched, memory);
  AwaitStarts();

  if (threadIdx.x == 0) {
    ExpectBytes(memory.arrivals, n_blocks * row * static_cast<int32_t>(sizeof(uint16_t)));
  }
  AwaitBytes(memory.arrivals);
  SumCounts<Threads>(row, n_blocks, block, memory, [&](int32_t e, int2 total) {
    if constexpr (kQuotas == Quotas::kSynced) {
      for (int32_t peer = block; peer < a.peers.size; peer += n_blocks) {
        uint64_t* to = peer == block ? inbox : a.peers.inboxes[peer];
        if (e <= p.n_logical) Send(a.peers, call, to, e, total.x);
        if (e < p.n_logical) Send(a.peers, call, to, e + 1, total.y);
      }
    }
  });
  if constexpr (kQuotas == Quotas::kSynced) {
    Routing::template Receive<Threads>(a, call, block == 0, memory);
    if (block == 0 && threadIdx.x == 0) a.peers.state->epoch = call.epoch;  // All have read it.
  }
  Threads::Sync();
  Routing::template Make<kQuotas, Threads>(a, in, element, fetched, call, block == 0, memory);
  // Orders nothing that the block's barrier after it does not order. But without it,
  // compute-sanitizer's racecheck (2025.3) reports the routes' stores. It takes 0.02 µs.
  Threads::Sync();
}

// The tokens that a thread of ClusterKernel holds: every 32nd of its warp's.
struct HeldTokens {
  int32_t first;
  int32_t n;
  // The expert: n_logical for an invalid id, n_logical + 1 for none or where there is no token.
  // Later, in the upper half, the token's ordinal among the expert's tokens in the block. Both are
  // below 2¹⁵.
  int32_t code[kMaxRounds];
};

// The work of the threads that hold tokens. They count their tokens, a.rounds each, and send the
// counts to all blocks: the planning threads are still busy with what needs no counts. Then, while
// the routes are made, they find every token's ordinal in the block.
template <int32_t kPlanThreads>
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
  const int32_t block = cooperative_groups::this_cluster().block_rank();
  held.first = (block * n_warps + warp) * 32 * a.rounds + (thread & 31);
  held.n = min(max((static_cast<int32_t>(tokens.n_tokens) - held.first + 31) / 32, 0), a.rounds);
  int32_t (&code)[kMaxRounds] = held.code;
  WithIndices(tokens, [&](auto* indices) {
    using Id = IdOf<std::decay_t<decltype(*indices)>>;
    // All loads are in flight before the first is used. Fewer branches than tokens.
    Id id[kMaxRounds];
    constexpr int kFew = 4;
#pragma unroll
    for (int begin = 0; begin < kMaxRounds; begin += kFew) {
      if (begin >= a.rounds) break;
#pragma unroll
      for (int j = begin; j < begin + kFew; ++j) {
        id[j] = Id::None();
        if (j < held.n) id[j] = Id(indices[held.first + 32 * j]);
      }
    }
    AnnounceStart();
    int4* pairs = reinterpret_cast<int4*>(memory.cells);  // The number of warps is even.
    const int32_t n_pairs = n_warps * (p.n_logical + RouteMemory::kPad) / 2;
#pragma unroll 1
    for (int32_t i = thread; i < n_pairs; i += n_threads) pairs[i] = {0, 0, 0, 0};
    asm volatile("bar.sync %0, %1;" ::"n"(kCleared), "r"(blockDim.x) : "memory");
#pragma unroll
    for (int j = 0; j < kMaxRounds; ++j) {
      if (j >= a.rounds) break;
      code[j] = id[j].Expert(p.n_logical, p.n_logical + 1);
      atomicAdd(&memory.counts[code[j]], 1);
    }
  });
  sync();
  AwaitStarts();
  SendCounts(RouteMemory::Row(p), a.cluster, block, thread, n_threads, memory);

  Cell* cells = memory.CellsOf(p, warp);
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    if (j >= a.rounds) break;
    code[j] |= OrdinalOf(cells + code[j]) << 16;
  }
  sync();
  ScanWarps(p.n_logical, warp, n_warps, &memory.cells[0].count,
            2 * (p.n_logical + RouteMemory::kPad), 2, [](int32_t, int32_t) {});
  sync();
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    if (j >= a.rounds) break;
    code[j] += static_cast<int32_t>(cells[code[j] & 0xffff].count << 16);
  }
}

// One cluster per batch element. The routes depend on the tokens' counts but not on their ordinals.
// So the first threads of a block make the routes while the others find the ordinals. Always
// launched as clusters, which __cluster_dims__() says, so that no instruction asks for it.
template <typename Routing, Quotas kQuotas>
__global__ void __cluster_dims__() __launch_bounds__(Routing::kPlanThreads + kRouteThreads, 1)
    ClusterKernel(const RouteArguments a) {
  extern __shared__ int4 shared[];
  constexpr int32_t kPlanThreads = Routing::kPlanThreads;
  const int32_t n_warps = (static_cast<int32_t>(blockDim.x) - kPlanThreads) / 32;
  const RouteMemory memory(a.problem, n_warps, a.cluster, kQuotas, shared);
  // With other ranks, the batch size is one.
  const int64_t element = kQuotas == Quotas::kSynced ? 0 : blockIdx.x >> (__ffs(a.cluster) - 1);
  const bool plans = threadIdx.x < kPlanThreads;
  const TokenBuffers tokens = TokensOf(a, element);
  HeldTokens held;
  if (plans) {
    PlanRoutes<Routing, kQuotas>(a, element, memory);
  } else {
    FindOrdinals<kPlanThreads>(a, tokens, memory, held);
  }
  __syncthreads();
  if (plans) {
    const int32_t block = cooperative_groups::this_cluster().block_rank();
    Routing::template Summarize<kQuotas, Team<kPlanThreads>>(a, element, block, a.cluster, memory);
    return;
  }
  WriteTokens<Routing, kMaxRounds>(a, tokens, memory, held.first, held.n, [&](int j) {
    const int32_t expert = held.code[j] & 0xffff;
    return NumberedToken{expert < a.problem.n_logical ? expert : -1,
                         memory.earlier[expert] + (held.code[j] >> 16)};
  });
}
#else
template <typename Routing, Quotas kQuotas>
__global__ void ClusterKernel(const RouteArguments) {}
#endif

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_CLUSTER_KERNEL_CUH_
