// Teams: the threads of a block that work together, with barriers and sums over them.
#ifndef LPLB_CUDA_TEAM_CUH_
#define LPLB_CUDA_TEAM_CUH_

#include <cstdint>

#include "cuda/warp.cuh"

namespace lplb::cuda {

// All threads of the block.
struct Block {
  static __device__ __forceinline__ int32_t Size() { return blockDim.x; }
  static __device__ __forceinline__ void Sync() { __syncthreads(); }
  static __device__ __forceinline__ bool Any(bool value) { return __syncthreads_or(value); }
};

// The first kThreads threads of the block, in whole warps. A single warp needs no block barrier.
template <int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMostSums = 5;

  // Two buffers, used in turn: between two uses of one, the barrier of the other intervenes.
  struct Memory {
    float sums[2][kMostSums][kWarps];
    uint2 keys[kWarps];
  };

  __device__ explicit Team(Memory& memory) : memory_(memory) {}

  static __device__ __forceinline__ int32_t Size() { return kThreads; }

  static __device__ __forceinline__ void Sync() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
    }
  }

  // The maximum of each of the first kMax values, which must be ≥ 0, and the sums of the others.
  // All threads get them.
  template <int kMax, int kAll>
  __device__ __forceinline__ void Reduce(float (&value)[kAll]) {
#pragma unroll
    for (int i = 0; i < kAll; ++i) value[i] = i < kMax ? WarpMax(value[i]) : value[i];
    SumUp<kMax>(value);
    if constexpr (kWarps > 1) {
      auto& sums = memory_.sums[turn_ ^= 1];
      if ((threadIdx.x & 31) == 0) {
#pragma unroll
        for (int i = 0; i < kAll; ++i) sums[i][threadIdx.x / 32] = value[i];
      }
      Sync();
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        value[i] = sums[i][0];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) {
          value[i] = i < kMax ? fmaxf(value[i], sums[i][w]) : value[i] + sums[i][w];
        }
      }
    }
  }

  // Whether any thread's value is true. Also a barrier.
  static __device__ __forceinline__ bool Any(bool value) {
    if constexpr (kWarps == 1) {
      const bool any = __any_sync(kFullWarp, value);
      __syncwarp();
      return any;
    } else {
      int32_t any;
      asm volatile(
          "{\n .reg .pred p, q;\n setp.ne.s32 p, %1, 0;\n bar.red.or.pred q, 1, %2, p;\n"
          " selp.s32 %0, 1, 0, q;\n}"
          : "=r"(any)
          : "r"(static_cast<int32_t>(value)), "n"(kThreads)
          : "memory");
      return any;
    }
  }

  // The team's largest value, which must be ≥ 0, and the smallest tag that comes with it.
  __device__ __forceinline__ uint2 Best(float value, uint32_t tag) {
    const uint32_t bits = __float_as_uint(value);
    uint2 best;
    best.x = __reduce_max_sync(kFullWarp, bits);
    best.y = __reduce_min_sync(kFullWarp, bits == best.x ? tag : ~0u);
    if constexpr (kWarps > 1) {
      if ((threadIdx.x & 31) == 0) memory_.keys[threadIdx.x / 32] = best;
      Sync();
      best = memory_.keys[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        const uint2 other = memory_.keys[w];
        if (other.x > best.x || (other.x == best.x && other.y < best.y)) best = other;
      }
    }
    return best;
  }

  // Values ≥ 0 compare like their bits.
  static __device__ __forceinline__ float WarpMax(float value) {
    return __uint_as_float(__reduce_max_sync(kFullWarp, __float_as_uint(value)));
  }

  // Sums over one warp of all values from kFirst on.
  template <int kFirst, int kAll>
  static __device__ __forceinline__ void SumUp(float (&value)[kAll]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (int i = kFirst; i < kAll; ++i) value[i] += __shfl_xor_sync(kFullWarp, value[i], step);
    }
  }

 private:
  Memory& memory_;
  int turn_ = 0;
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_TEAM_CUH_
