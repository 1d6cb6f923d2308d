#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/loads.h"
#include "cuda/problem.h"

namespace lplb::cuda {
namespace {

constexpr int32_t kThreads = 256;

template <typename Index>
__global__ void CountKernel(const Index* indices, int64_t n_tokens, int32_t n_logical,
                            int32_t* counts) {
  extern __shared__ int32_t histogram[];
  const int64_t element = blockIdx.x;
  for (int32_t e = threadIdx.x; e <= n_logical; e += kThreads) histogram[e] = 0;
  __syncthreads();
  const Index* tokens = indices + element * n_tokens;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < n_tokens;
       i += stride) {
    const int32_t expert = ExpertOf(tokens[i], n_logical);
    if (expert >= 0) atomicAdd(&histogram[expert], 1);
  }
  __syncthreads();
  for (int32_t e = threadIdx.x; e <= n_logical; e += kThreads) {
    if (histogram[e] != 0) atomicAdd(&counts[element * (n_logical + 1) + e], histogram[e]);
  }
}

}  // namespace

template <typename Index>
cudaError_t LaunchCount(const Index* indices, int64_t batch, int64_t n_tokens, int32_t n_logical,
                        int32_t* counts, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  const int64_t row = n_logical + 1;
  const cudaError_t error =
      cudaMemsetAsync(counts, 0, batch * row * static_cast<int64_t>(sizeof(int32_t)), stream);
  if (error != cudaSuccess || n_tokens == 0) return error;
  const int64_t tiles = std::clamp<int64_t>(n_tokens / (8 * kThreads), 1, 264);
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(batch), static_cast<unsigned>(tiles));
  launch.threads = kThreads;
  launch.shared_bytes = row * static_cast<int64_t>(sizeof(int32_t));
  return Launch(CountKernel<Index>, launch, stream, indices, n_tokens, n_logical, counts);
}

#define LPLB_INSTANTIATE(Index)                                                              \
  template cudaError_t LaunchCount<Index>(const Index*, int64_t, int64_t, int32_t, int32_t*, \
                                          cudaStream_t)
LPLB_INSTANTIATE(int32_t);
LPLB_INSTANTIATE(int64_t);
LPLB_INSTANTIATE(uint8_t);
LPLB_INSTANTIATE(uint16_t);
#undef LPLB_INSTANTIATE

}  // namespace lplb::cuda
