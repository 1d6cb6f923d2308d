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

#include "cuda/route.h"
#include "cuda/solver.cuh"

namespace lplb::cuda {

constexpr int32_t kMaxThreads = 1024;
constexpr int32_t kMaxRounds = 8;  // Tokens that a lane holds in registers.

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

// Shared memory of a block that routes tokens, in int32 words.
struct RouteMemory {
  uint32_t* counts;      // [n_warps, row], two 16-bit counts a word; a block has < 2¹⁶ tokens
  uint32_t* masks;       // [n_warps, n_logical], lanes with a token of this expert; 0 between uses
  int32_t* histogram;    // [n_logical + 1], the block's tokens; invalid ids last
  int32_t* total;        // [n_logical + 1], all blocks' tokens
  int4* routes;          // [n_logical], Route and the expert's tokens in earlier blocks
  int32_t* quota;        // [n_physical]
  int32_t* slot_counts;  // [n_physical]
  int32_t* groups;       // GroupMemory

  // Words of a row of counts: such that the reads of ScanWarps meet no bank twice.
  LPLB_HOST_DEVICE static int32_t Row(int32_t n_logical, int32_t n_warps) {
    const int32_t rows = n_warps / 8;
    const int32_t words = (n_logical + 1) / 2;
    const int32_t unit = 32 / rows;
    return (words + unit - 1) / unit * unit + 4 / rows;
  }

  LPLB_HOST_DEVICE static int32_t Words(const Problem& p, int32_t n_warps, bool solves) {
    return 4 * p.n_logical + n_warps * (Row(p.n_logical, n_warps) + p.n_logical) +
           2 * (p.n_logical + 1) + 2 * p.n_physical +
           (solves ? GroupMemory::Words(p, p.n_groups) : 0);
  }

  __device__ RouteMemory(const Problem& p, int32_t n_warps, int4* memory) {
    routes = memory;
    counts = reinterpret_cast<uint32_t*>(routes + p.n_logical);
    masks = counts + n_warps * Row(p.n_logical, n_warps);
    histogram = reinterpret_cast<int32_t*>(masks + n_warps * p.n_logical);
    total = histogram + p.n_logical + 1;
    quota = total + p.n_logical + 1;
    slot_counts = quota + p.n_physical;
    groups = slot_counts + p.n_physical;
  }
};

// Clears what counting needs, and loads the experts' slots.
__device__ __forceinline__ void Prepare(const RouteArguments& a, const int32_t* log2phy,
                                        const RouteMemory& memory) {
  const Problem& p = a.problem;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t words = n_warps * (RouteMemory::Row(p.n_logical, n_warps) + p.n_logical);
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < words; i += blockDim.x) memory.counts[i] = 0;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += blockDim.x) memory.slot_counts[i] = 0;
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
    const Route route = SlotsOf(p, log2phy, e);
    memory.routes[e] = {route.keep, route.home, route.replica, 0};
  }
}

// Counts this lane's token of `expert` (−1: none) into the warp's tables; returns how many earlier
// tokens of the warp have the same expert. All lanes call it.
__device__ __forceinline__ int32_t Rank(int32_t expert, uint16_t* counts, uint32_t* masks) {
  const uint32_t lane = threadIdx.x & 31;
  const bool valid = expert >= 0;
  if (valid) atomicOr(&masks[expert], 1u << lane);
  __syncwarp();
  const uint32_t same = valid ? masks[expert] : 0;
  const int32_t before = valid ? counts[expert] : 0;
  const int32_t lower = __popc(same & ((1u << lane) - 1));
  __syncwarp();
  if (valid && lower == 0) {  // The first of them keeps the tables.
    masks[expert] = 0;
    counts[expert] = static_cast<uint16_t>(before + __popc(same));
  }
  __syncwarp();
  return before + lower;
}

// Turns every warp's counts into the sums of the warps before, and writes the histogram. A warp
// takes four words at a time; an eighth of the lanes each take n_warps / 8 rows.
__device__ __forceinline__ void ScanWarps(int32_t n_logical, const RouteMemory& memory) {
  const int32_t n_warps = blockDim.x / 32;
  const int32_t rows = n_warps / 8;  // 1, 2 or 4
  const int32_t row = RouteMemory::Row(n_logical, n_warps);
  const int32_t lane = threadIdx.x & 31;
  const int32_t words = (n_logical + 1) / 2;
#pragma unroll 1
  for (int32_t first = threadIdx.x / 32 * 4; first < words; first += n_warps * 4) {
    const int32_t column = first + (lane & 3);
    uint32_t* cell = memory.counts + (lane >> 2) * rows * row + column;
    uint32_t before[4];
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      before[i] = sum;
      if (i < rows && column < words) sum += cell[i * row];
    }
    uint32_t up_to = sum;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, up_to, step);
      if (lane >= step) up_to += other;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < rows && column < words) cell[i * row] = up_to - sum + before[i];
    }
    if (lane >= 28 && column < words) {
      memory.histogram[2 * column] = up_to & 0xffff;
      if (2 * column + 1 < n_logical) memory.histogram[2 * column + 1] = up_to >> 16;
    }
  }
}

// From the experts' totals to their routes: solves, or takes the quotas that are given, and writes
// what the whole batch gets once, if this block is its `leader`. All threads of the block call it
// behind a barrier; another must follow.
template <int kWords, int kColumns, bool kSolves>
__device__ __forceinline__ void MakeRoutes(const RouteArguments& a, int64_t element,
                                           const Ahead& ahead, bool leader,
                                           const RouteMemory& memory) {
  const Problem& p = a.problem;
  const AssignOperands given = BatchElement(p, a.sources, a.given, element);
  const int32_t* quota = given.quota;
  int32_t rank = 0;
  if constexpr (kSolves) {
    const Groups groups = {0, p.n_groups};
    const SolveOperands in = BatchElement(p, a.sources, a.solve_in, element);
    const SolveResults out = BatchElement(p, a.solve_out, element);
    const GroupMemory group_memory(p, p.n_groups, memory.groups);
    LoadRanks(p, in, groups, ahead, CountedTotals{memory.total}, group_memory);
    __syncthreads();
    SolveGroups<kWords, kColumns>(p, in, groups, ahead, group_memory, memory.quota,
                                  [&](int32_t g, const Proof& proof) {
                                    if (!leader) return;
                                    out.max_load[g] = proof.max_load;
                                    out.lower_bound[g] = proof.lower_bound;
                                  });
    __syncthreads();
    quota = memory.quota;
    if (leader) {
      const int32_t invalid = memory.total[p.n_logical] != 0 ? kInvalidIndex : 0;
#pragma unroll 1
      for (int32_t g = threadIdx.x; g < p.n_groups; g += blockDim.x) {
        out.status[g] = group_memory.status[g] | invalid;
      }
#pragma unroll 1
      for (int32_t i = threadIdx.x; i < p.n_physical; i += blockDim.x) out.quota[i] = quota[i];
    }
  } else {
    rank = *given.rank;
  }
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
    int4& cell = memory.routes[e];
    const Route route = {cell.x, cell.y, cell.z};
    const int32_t keep = KeepOf(p, a.sources, given.counts, quota, rank, a.proportional, e, route);
    cell.x = keep;
    if (leader && a.tokens.slot_counts != nullptr) {
      const int32_t stays = min(keep, memory.total[e]);
      if (route.home >= 0) atomicAdd(&memory.slot_counts[route.home], stays);
      if (route.replica >= 0) {
        atomicAdd(&memory.slot_counts[route.replica], memory.total[e] - stays);
      }
    }
  }
}

__device__ __forceinline__ void WriteSlotCounts(const RouteArguments& a, int64_t element,
                                                const RouteMemory& memory) {
  const int32_t n = a.problem.n_physical;
  int32_t* out = a.tokens.slot_counts + element * n;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) out[i] = memory.slot_counts[i];
}

// Writes the slot, and the position in its list, of token `i` with this ordinal among its block's
// tokens of `expert` (−1: none).
__device__ __forceinline__ void WriteToken(const TokenBuffers& tokens, int64_t i, int32_t expert,
                                           int32_t ordinal, const RouteMemory& memory) {
  int32_t slot = -1;
  int32_t position = -1;
  if (expert >= 0) {
    const int4 route = memory.routes[expert];
    ordinal += route.w;
    const bool stays = ordinal < route.x;
    slot = stays ? route.y : route.z;
    position = slot < 0 ? -1 : stays ? ordinal : ordinal - route.x;
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

// What a kernel that solves can fetch before it knows a load.
template <bool kSolves>
__device__ __forceinline__ Ahead PrepareSolver(const RouteArguments& a, int64_t element,
                                               const RouteMemory& memory) {
  Ahead ahead = {-1, 0, -1};
  if constexpr (kSolves) {
    const Problem& p = a.problem;
    const SolveOperands in = BatchElement(p, a.sources, a.solve_in, element);
    const GroupMemory group_memory(p, p.n_groups, memory.groups);
    ahead = AheadOf(p, in, {0, p.n_groups});
    LoadTopology(p, in.r2o, group_memory, threadIdx.x, blockDim.x);
    for (int32_t g = threadIdx.x; g < p.n_groups; g += blockDim.x) group_memory.status[g] = 0;
  }
  return ahead;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// One cluster per batch element; its blocks hold a.rounds tokens per thread.
template <int kWords, int kColumns, bool kSolves>
__global__ void __launch_bounds__(kMaxThreads) ClusterKernel(const RouteArguments a) {
  extern __shared__ int4 shared[];
  const auto cluster = cooperative_groups::this_cluster();
  const Problem& p = a.problem;
  const int32_t n_blocks = cluster.num_blocks();
  const int32_t block = cluster.block_rank();
  const int64_t element = blockIdx.x / n_blocks;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x & 31;
  const RouteMemory memory(p, n_warps, shared);
  const TokenBuffers tokens = TokensOf(a, element);

  // The tokens are on their way while the tables are cleared.
  const int64_t first = (static_cast<int64_t>(block) * n_warps + warp) * 32 * a.rounds + lane;
  int32_t code[kMaxRounds];  // the expert, n_logical for an invalid id, −1 for none
  WithIndices(tokens, [&](auto* indices) {
#pragma unroll
    for (int j = 0; j < kMaxRounds; ++j) {
      const int64_t i = first + 32 * j;
      code[j] = -1;
      if (j < a.rounds && i < tokens.n_tokens) code[j] = ExpertOf(indices[i], p.n_logical);
    }
  });
  const int32_t* log2phy = kSolves ? BatchElement(p, a.sources, a.solve_in, element).log2phy
                                   : BatchElement(p, a.sources, a.given, element).log2phy;
  Prepare(a, log2phy, memory);
  const Ahead ahead = PrepareSolver<kSolves>(a, element, memory);
  __syncthreads();

  auto* counts =
      reinterpret_cast<uint16_t*>(memory.counts + warp * RouteMemory::Row(p.n_logical, n_warps));
  uint32_t* masks = memory.masks + warp * p.n_logical;
  bool invalid = false;
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    if (j >= a.rounds) break;
    invalid |= code[j] == p.n_logical;
    const int32_t expert = code[j] == p.n_logical ? -1 : code[j];
    const int32_t ordinal = Rank(expert, counts, masks);
    code[j] = expert < 0 ? -1 : expert | ordinal << 16;  // n_logical ≤ 2¹⁵, ordinal < 2⁸
  }
  invalid = __syncthreads_or(invalid);
  if (threadIdx.x == 0) memory.histogram[p.n_logical] = invalid;
  ScanWarps(p.n_logical, memory);

  cluster.sync();
#pragma unroll 1
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += blockDim.x) {
    int32_t total = 0;
    int32_t earlier = 0;
#pragma unroll 8
    for (int32_t b = 0; b < n_blocks; ++b) {
      const int32_t count = cluster.map_shared_rank(memory.histogram, b)[e];
      total += count;
      if (b < block) earlier += count;
    }
    memory.total[e] = total;
    if (e < p.n_logical) memory.routes[e].w = earlier;
  }
  cluster.barrier_arrive();  // Nobody needs this block's histogram once all have arrived.
  __syncthreads();
  MakeRoutes<kWords, kColumns, kSolves>(a, element, ahead, block == 0, memory);
  __syncthreads();
  if (block == 0 && a.tokens.slot_counts != nullptr) WriteSlotCounts(a, element, memory);
#pragma unroll
  for (int j = 0; j < kMaxRounds; ++j) {
    const int64_t i = first + 32 * j;
    if (j >= a.rounds || i >= tokens.n_tokens) break;
    const int32_t expert = code[j] < 0 ? -1 : code[j] & 0xffff;
    const int32_t ordinal = expert < 0 ? 0 : counts[expert] + (code[j] >> 16);
    WriteToken(tokens, i, expert, ordinal, memory);
  }
  cluster.barrier_wait();
}
#else
template <int kWords, int kColumns, bool kSolves>
__global__ void ClusterKernel(const RouteArguments) {}
#endif

// The tokens of a warp of a tile: [begin, end).
struct Span {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ Span SpanOf(const RouteArguments& a, int32_t tile, int32_t warp,
                                       int32_t n_warps) {
  const int64_t begin = (static_cast<int64_t>(tile) * n_warps + warp) * a.tokens_per_warp;
  return {min(begin, a.tokens.n_tokens), min(begin + a.tokens_per_warp, a.tokens.n_tokens)};
}

// A tile's part of the workspace: every warp's sums of the warps before, then the histogram.
__device__ __forceinline__ int32_t* TileOf(const RouteArguments& a, int64_t element, int32_t tile) {
  return a.workspace + (element * a.n_tiles + tile) * a.workspace_words;
}

static __global__ void __launch_bounds__(kMaxThreads) TileCountKernel(const RouteArguments a) {
  extern __shared__ int4 shared[];
  const Problem& p = a.problem;
  const int64_t element = blockIdx.x;
  const int32_t tile = blockIdx.y;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t warp = threadIdx.x / 32;
  const RouteMemory memory(p, n_warps, shared);
  const TokenBuffers tokens = TokensOf(a, element);
  const int32_t words = n_warps * RouteMemory::Row(p.n_logical, n_warps);
  for (int32_t i = threadIdx.x; i < words; i += blockDim.x) memory.counts[i] = 0;
  __syncthreads();

  uint32_t* counts = memory.counts + warp * RouteMemory::Row(p.n_logical, n_warps);
  const Span span = SpanOf(a, tile, warp, n_warps);
  bool invalid = false;
  WithIndices(tokens, [&](auto* indices) {
#pragma unroll 8
    for (int64_t i = span.begin + (threadIdx.x & 31); i < span.end; i += 32) {
      const int32_t expert = ExpertOf(indices[i], p.n_logical);
      invalid |= expert == p.n_logical;
      if (expert >= 0 && expert < p.n_logical) {
        atomicAdd(&counts[expert >> 1], expert & 1 ? 1u << 16 : 1u);
      }
    }
  });
  invalid = __syncthreads_or(invalid);
  if (threadIdx.x == 0) memory.histogram[p.n_logical] = invalid;
  ScanWarps(p.n_logical, memory);
  __syncthreads();
  int32_t* out = TileOf(a, element, tile);
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < words; i += blockDim.x) {
    out[i] = static_cast<int32_t>(memory.counts[i]);
  }
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += blockDim.x) {
    out[words + e] = memory.histogram[e];
  }
}

template <int kWords, int kColumns, bool kSolves>
__global__ void __launch_bounds__(kMaxThreads) TileRouteKernel(const RouteArguments a) {
  extern __shared__ int4 shared[];
  const Problem& p = a.problem;
  const int64_t element = blockIdx.x;
  const int32_t tile = blockIdx.y;
  const int32_t n_warps = blockDim.x / 32;
  const int32_t warp = threadIdx.x / 32;
  const RouteMemory memory(p, n_warps, shared);
  const TokenBuffers tokens = TokensOf(a, element);
  const int32_t* log2phy = kSolves ? BatchElement(p, a.sources, a.solve_in, element).log2phy
                                   : BatchElement(p, a.sources, a.given, element).log2phy;
  Prepare(a, log2phy, memory);
  const Ahead ahead = PrepareSolver<kSolves>(a, element, memory);
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += blockDim.x) memory.total[e] = 0;
  __syncthreads();

  const int32_t words = n_warps * RouteMemory::Row(p.n_logical, n_warps);
  const int32_t* mine = TileOf(a, element, tile);
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < words; i += blockDim.x) {
    memory.counts[i] = static_cast<uint32_t>(mine[i]);
  }
  // Each part of the threads sums every n_parts-th tile.
  const int32_t width = (p.n_logical + 1 + 31) / 32 * 32;
  const int32_t n_parts = max(static_cast<int32_t>(blockDim.x) / width, 1);
  const int32_t part = static_cast<int32_t>(threadIdx.x) / width;
  for (int32_t e = threadIdx.x - part * width; part < n_parts && e <= p.n_logical;
       e += n_parts > 1 ? width : blockDim.x) {
    int32_t total = 0;
    int32_t earlier = 0;
#pragma unroll 8
    for (int32_t t = part; t < a.n_tiles; t += n_parts) {
      const int32_t count = TileOf(a, element, t)[words + e];
      total += count;
      if (t < tile) earlier += count;
    }
    atomicAdd(&memory.total[e], total);
    if (e < p.n_logical) atomicAdd(&memory.routes[e].w, earlier);
  }
  __syncthreads();
  MakeRoutes<kWords, kColumns, kSolves>(a, element, ahead, tile == 0, memory);
  __syncthreads();
  if (tile == 0 && a.tokens.slot_counts != nullptr) WriteSlotCounts(a, element, memory);

  auto* counts =
      reinterpret_cast<uint16_t*>(memory.counts + warp * RouteMemory::Row(p.n_logical, n_warps));
  uint32_t* masks = memory.masks + warp * p.n_logical;
  const Span span = SpanOf(a, tile, warp, n_warps);
  WithIndices(tokens, [&](auto* indices) {
  // All lanes stay in the loop for Rank.
#pragma unroll 1
    for (int64_t begin = span.begin; begin < span.end; begin += 32 * kMaxRounds) {
      int32_t expert[kMaxRounds];
      const int64_t first = begin + (threadIdx.x & 31);
#pragma unroll
      for (int j = 0; j < kMaxRounds; ++j) {
        const int64_t i = first + 32 * j;
        expert[j] = i < span.end ? ExpertOf(indices[i], p.n_logical) : -1;
        if (expert[j] == p.n_logical) expert[j] = -1;
      }
#pragma unroll
      for (int j = 0; j < kMaxRounds; ++j) {
        if (begin + 32 * j >= span.end) break;
        const int64_t i = first + 32 * j;
        const int32_t ordinal = Rank(expert[j], counts, masks);
        if (i < span.end) WriteToken(tokens, i, expert[j], ordinal, memory);
      }
    }
  });
}

// How the kernels are launched.
struct RouteShape {
  int32_t cluster;  // blocks of a cluster; 0: tiles
  int32_t threads;
  int32_t rounds;
};

RouteShape ChooseShape(const RouteArguments& arguments);
cudaError_t AllowSharedMemory(const void* kernel, int32_t bytes, bool large_cluster);

// Launches the kernels for a.batch elements.
template <int kWords, int kColumns, bool kSolves>
cudaError_t LaunchRoute(RouteArguments a, cudaStream_t stream) {
  const RouteShape shape = ChooseShape(a);
  const int32_t n_warps = shape.threads / 32;
  const int32_t bytes = RouteMemory::Words(a.problem, n_warps, kSolves) * 4;
  cudaError_t error;
  if (shape.cluster > 0) {
    const auto kernel = ClusterKernel<kWords, kColumns, kSolves>;
    error = AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes, shape.cluster > 8);
    if (error != cudaSuccess) return error;
    a.rounds = shape.rounds;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(a.batch * shape.cluster));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, a);
  }
  const auto kernel = TileRouteKernel<kWords, kColumns, kSolves>;
  error = AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes, false);
  if (error != cudaSuccess) return error;
  error = AllowSharedMemory(reinterpret_cast<const void*>(TileCountKernel), bytes, false);
  if (error != cudaSuccess) return error;
  const int64_t warps = static_cast<int64_t>(a.n_tiles) * n_warps;
  a.tokens_per_warp = ((a.tokens.n_tokens + warps - 1) / warps + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(a.batch), a.n_tiles);
  TileCountKernel<<<grid, shape.threads, bytes, stream>>>(a);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  kernel<<<grid, shape.threads, bytes, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_CUH_
