// Warp constants that all kernels share.
#ifndef LPLB_CUDA_WARP_CUH_
#define LPLB_CUDA_WARP_CUH_

#include <cstdint>

namespace lplb::cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_WARP_CUH_
