// For larger batches, or chips without clusters: one launch counts tiles, and one assigns them.
#ifndef LPLB_CUDA_ROUTE_TILE_KERNELS_CUH_
#define LPLB_CUDA_ROUTE_TILE_KERNELS_CUH_

#include <type_traits>

#include "cuda/route/routing.cuh"
#include "cuda/route/tokens.cuh"

namespace lplb::cuda {

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

// A tile's part of the workspace: its histogram [n_logical + 1], then for every warp the sums over
// the warps before it, [n_warps, n_logical].
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
    const SyncCall call = {state.epoch + 1, state.failed != 0};  // See Peers.
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

template <typename Routing, Quotas kQuotas>
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
  const Tables tables = TablesOf<kQuotas>(a, in, element);

  auto fetched = Routing::template Prefetch<kQuotas, Block>(a, in, element, tables);
  for (int32_t e = threadIdx.x; e <= p.n_logical; e += blockDim.x) {
    memory.own[e] = 0;
    if (e < p.n_logical) memory.earlier[e] = 0;
  }
  ForgetInvalid<kQuotas>(p, memory);
  Routing::template Store<kQuotas, Block>(a, in, element, tables, fetched, memory);
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();  // From here on, the tiles' counts are complete.
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
  SyncCall call = {};
  if constexpr (kQuotas == Quotas::kSynced) {
    call = BeginSync(a.peers, __ldcg(&a.peers.state->epoch), *a.given.rank, tile == 0);
    Routing::template Receive<Block>(a, call, tile == 0, memory);
    __syncthreads();
  }
  // Of ids that name no expert.
  if (threadIdx.x < n_warps) memory.CellsOf(p, threadIdx.x)[p.n_logical] = {0, 0};
  // From here on, a cell counts from the batch's first token.
  const int32_t* warps_before = TileOf(a, element, tile) + row;
  for (int32_t e = threadIdx.x; e < p.n_logical; e += blockDim.x) {
    const int32_t earlier = memory.earlier[e];
#pragma unroll 8
    for (int32_t w = 0; w < n_warps; ++w) {
      memory.CellsOf(p, w)[e] = {
          0, static_cast<uint32_t>(earlier + warps_before[w * p.n_logical + e])};
    }
  }
  Routing::template Make<kQuotas, Block>(a, in, element, fetched, call, tile == 0, memory);
  __syncthreads();
  __syncthreads();  // As in ClusterKernel.

  Cell* cells = memory.CellsOf(p, threadIdx.x / 32);
  const Span span = SpanOf(a, tile);
  WithIndices(tokens, [&](auto* indices) {
  // All lanes stay in the loop because OrdinalOf needs them.
#pragma unroll 1
    for (int64_t begin = span.begin; begin < span.end; begin += 32 * kAtOnce) {
      std::decay_t<decltype(*indices)> id[kAtOnce];
      const int64_t first = begin + (threadIdx.x & 31);
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + 32 * j < span.end) id[j] = indices[first + 32 * j];
      }
      NumberedToken token[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + 32 * j >= span.end) break;
        const int32_t expert = first + 32 * j < span.end ? ExpertOf(id[j], p.n_logical) : -1;
        token[j].expert = expert == p.n_logical ? -1 : expert;
        token[j].ordinal = OrdinalOf(cells + (expert < 0 ? p.n_logical : expert));
      }
      const int64_t n = min((span.end - first + 31) / 32, int64_t{kAtOnce});
      WriteTokens<Routing, kAtOnce>(a, tokens, memory, first, static_cast<int32_t>(n),
                                    [&](int j) { return token[j]; });
    }
  });
  Routing::template Summarize<kQuotas, Block>(a, element, tile, a.n_tiles, memory);
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_TILE_KERNELS_CUH_
