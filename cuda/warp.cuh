// What all kernels that work warp by warp share.
#ifndef LPLB_CUDA_WARP_CUH_
#define LPLB_CUDA_WARP_CUH_

#include <cstdint>

namespace lplb::cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;

// A thread's place in its warp, in blocks of one dimension.
__device__ __forceinline__ int32_t Lane() { return static_cast<int32_t>(threadIdx.x) & 31; }

// The warp's number. It comes from lane 0, so that the compiler knows that all lanes have the same:
// in a loop over warps, it need not expect that some lanes have left. Whole warps call it.
__device__ __forceinline__ int32_t WarpIndex() {
  return __shfl_sync(kFullWarp, static_cast<int32_t>(threadIdx.x) / 32, 0);
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_WARP_CUH_
