// Tokens: reading their experts, counting them, and writing their slots.
//
// A token's ordinal among its expert's tokens decides where it goes. It is the sum of the expert's
// tokens in earlier blocks, in earlier warps of its block, in earlier rounds of its warp, and in
// lower lanes. Warps hold consecutive tokens, and blocks consecutive warps.
#ifndef LPLB_CUDA_ROUTE_TOKENS_CUH_
#define LPLB_CUDA_ROUTE_TOKENS_CUH_

#include "cuda/route/tables.cuh"

namespace lplb::cuda {

// Calls `function` with a typed pointer to the indices.
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

// The tokens of this batch element.
__device__ __forceinline__ TokenBuffers TokensOf(const RouteArguments& a, int64_t element) {
  TokenBuffers tokens = a.tokens;
  const int64_t first = element * tokens.n_tokens;
  tokens.indices = static_cast<const char*>(tokens.indices) + first * IndexBytes(tokens.type);
  tokens.physical += first;
  if (tokens.position != nullptr) tokens.position += first;
  return tokens;
}

// Counts this lane's token into its warp's cell of the expert. Returns how many earlier tokens the
// cell had. All lanes must call it.
__device__ __forceinline__ int32_t OrdinalOf(Cell* cell) {
  const uint32_t lane = threadIdx.x & 31;
  atomicOr(&cell->mask, 1u << lane);
  __syncwarp();
  const uint2 seen = *reinterpret_cast<const uint2*>(cell);
  const uint32_t lower = seen.x & ((1u << lane) - 1);
  __syncwarp();
  if (lower == 0) {  // The lowest lane updates the cell.
    *reinterpret_cast<uint2*>(cell) = {0, seen.y + __popc(seen.x)};
  }
  __syncwarp();
  return static_cast<int32_t>(seen.y + __popc(lower));
}

// Replaces every warp's counts by the sums over the warps before it. n_warps warps call it. Each
// lane takes half of an expert's rows. `counts` are 32-bit, row_stride and column_stride words
// apart. `emit(expert, total)` is called once per expert.
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

// A token's slot, and its place among this source's tokens there; −1 if it has none.
struct Place {
  int32_t slot;
  int32_t position;

  Place() = default;
  __device__ __forceinline__ Place(int32_t slot_, int32_t position_)
      : slot(slot_ == kNoSlot ? -1 : slot_), position(slot_ == kNoSlot ? -1 : position_) {}
};

// A token's expert (−1: none), and its ordinal among all of the expert's tokens.
struct NumberedToken {
  int32_t expert;
  int32_t ordinal;
};

// Where a token goes if its expert keeps the first `keep` at home and sends the others to one slot.
__device__ __forceinline__ Place PlaceBy(const PackedRoute& route, int32_t keep,
                                         const NumberedToken& token) {
  const bool stays = token.ordinal < keep;
  return Place(token.expert < 0 ? kNoSlot
               : stays          ? route.home
                                : route.replica,
               stays ? token.ordinal : token.ordinal - keep);
}

// Writes where the first n of a lane's tokens go, kAll at most: token_of(j) is token first + 32 j.
// Their reads are in flight several at a time: one after the other, each would wait for its own.
template <typename Routing, int kAll, typename TokenOf>
__device__ __forceinline__ void WriteTokens(const RouteArguments& a, const TokenBuffers& tokens,
                                            const RouteMemory& memory, int64_t first, int32_t n,
                                            const TokenOf& token_of) {
#pragma unroll
  for (int begin = 0; begin < kAll; begin += kLookedUp) {
    if (begin >= n) return;
    NumberedToken token[kLookedUp];
    Place place[kLookedUp];
#pragma unroll
    for (int j = 0; j < kLookedUp; ++j) {
      token[j] = begin + j < n ? token_of(begin + j) : NumberedToken{-1, 0};
    }
    Routing::LookUp(a, memory, token, place);
#pragma unroll
    for (int j = 0; j < kLookedUp; ++j) {
      if (begin + j >= n) return;
      tokens.physical[first + 32 * (begin + j)] = place[j].slot;
      if (tokens.position != nullptr) {
        tokens.position[first + 32 * (begin + j)] = place[j].position;
      }
    }
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ROUTE_TOKENS_CUH_
