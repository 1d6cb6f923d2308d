// assign in two launches: count every tile of tokens, then give every token its slot from its
// ordinal among its expert's tokens, which is tiles before + warps before + lanes before.
#include <algorithm>

#include "cuda/assignment.h"

namespace lplb::cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// A half-open range of a row of tokens.
struct Range {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ Range Part(Range whole, int64_t i, int64_t n) {
  const int64_t size = (whole.end - whole.begin + n - 1) / n;
  const int64_t begin = min(whole.begin + i * size, whole.end);
  return {begin, min(begin + size, whole.end)};
}

// Counts the tokens of `range`, taken by threads `first`, `first + stride`, …, into `counters`.
template <typename Index>
__device__ __forceinline__ void CountRange(const Index* indices, Range range, int32_t first,
                                           int32_t stride, int32_t n_logical, int32_t* counters) {
  for (int64_t i = range.begin + first; i < range.end; i += stride) {
    const int32_t expert = ExpertOf(indices[i], n_logical);
    if (expert >= 0 && expert < n_logical) atomicAdd(&counters[expert], 1);
  }
}

template <typename Index>
__global__ void CountTilesKernel(Tokens<Index> tokens, int32_t n_logical) {
  extern __shared__ int32_t histogram[];
  const int64_t element = blockIdx.y;
  for (int32_t e = threadIdx.x; e < n_logical; e += kThreads) histogram[e] = 0;
  __syncthreads();
  const Range tile = Part({0, tokens.n_tokens}, blockIdx.x, tokens.n_tiles);
  CountRange(tokens.indices + element * tokens.n_tokens, tile, threadIdx.x, kThreads, n_logical,
             histogram);
  __syncthreads();
  int32_t* row = tokens.workspace + (element * tokens.n_tiles + blockIdx.x) * n_logical;
  for (int32_t e = threadIdx.x; e < n_logical; e += kThreads) row[e] = histogram[e];
}

template <typename Index>
__global__ void AssignTilesKernel(Problem p, Sources sources, AssignOperands first_in,
                                  bool proportional, Tokens<Index> tokens) {
  extern __shared__ int32_t shared[];
  const int64_t element = blockIdx.y;
  const int32_t n = p.n_logical;
  Route* routes = reinterpret_cast<Route*>(shared);
  int32_t* counters = shared + 3 * n;  // [kWarps, n], ordinal of each warp's next token
  const AssignOperands in = BatchElement(p, sources, first_in, element);
  const Index* indices = tokens.indices + element * tokens.n_tokens;
  int32_t* physical = tokens.physical + element * tokens.n_tokens;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x & 31;
  int32_t* mine = counters + warp * n;

  for (int32_t i = threadIdx.x; i < kWarps * n; i += kThreads) counters[i] = 0;
  __syncthreads();
  const Range tile = Part({0, tokens.n_tokens}, blockIdx.x, tokens.n_tiles);
  const Range part = Part(tile, warp, kWarps);
  CountRange(indices, part, lane, 32, n, mine);
  __syncthreads();

  const int32_t* tile_counts = tokens.workspace + element * tokens.n_tiles * n;
  for (int32_t e = threadIdx.x; e < n; e += kThreads) {
    routes[e] = RouteOf(p, sources, in, *in.rank, proportional, e);
    int32_t next = 0;
#pragma unroll 8
    for (int32_t t = 0; t < blockIdx.x; ++t) next += tile_counts[static_cast<int64_t>(t) * n + e];
    for (int32_t w = 0; w < kWarps; ++w) {
      const int32_t count = counters[w * n + e];
      counters[w * n + e] = next;
      next += count;
    }
  }
  __syncthreads();

  // All lanes stay in the loop: match_any wants them.
  for (int64_t begin = part.begin; begin < part.end; begin += 32) {
    const int64_t i = begin + lane;
    const int32_t expert = i < part.end ? ExpertOf(indices[i], n) : -1;
    const bool valid = expert >= 0 && expert < n;
    const uint32_t same = __match_any_sync(kFullWarp, valid ? expert : -1);
    const int32_t before = __popc(same & ((1u << lane) - 1));
    int32_t slot = -1;
    if (valid) {
      const Route& route = routes[expert];
      slot = mine[expert] + before < route.keep ? route.home : route.replica;
    }
    __syncwarp();
    if (valid && before == 0) mine[expert] += __popc(same);
    __syncwarp();
    if (i < part.end) physical[i] = slot;
  }
}

}  // namespace

template <typename Index>
cudaError_t LaunchAssign(const Problem& problem, const Sources& sources, const AssignOperands& in,
                         bool proportional, const Tokens<Index>& tokens, cudaStream_t stream) {
  if (tokens.batch == 0 || tokens.n_tokens == 0) return cudaSuccess;
  const int64_t words = problem.n_logical;
  const size_t count_bytes = words * sizeof(int32_t);
  const size_t assign_bytes = words * (3 + kWarps) * sizeof(int32_t);
  const auto assign_kernel = AssignTilesKernel<Index>;
  if (assign_bytes > (48 << 10)) {
    const cudaError_t error = cudaFuncSetAttribute(
        assign_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(assign_bytes));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(tokens.n_tiles), static_cast<unsigned>(tokens.batch));
  if (tokens.n_tiles > 1) {
    CountTilesKernel<<<grid, kThreads, count_bytes, stream>>>(tokens, problem.n_logical);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  assign_kernel<<<grid, kThreads, assign_bytes, stream>>>(problem, sources, in, proportional,
                                                          tokens);
  return cudaGetLastError();
}

#define LPLB_INSTANTIATE(Index)                                                                   \
  template cudaError_t LaunchAssign<Index>(const Problem&, const Sources&, const AssignOperands&, \
                                           bool, const Tokens<Index>&, cudaStream_t)
LPLB_INSTANTIATE(int32_t);
LPLB_INSTANTIATE(int64_t);
LPLB_INSTANTIATE(uint8_t);
LPLB_INSTANTIATE(uint16_t);
#undef LPLB_INSTANTIATE

}  // namespace lplb::cuda
