// Launcher of count: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_LOADS_H_
#define LPLB_CUDA_LOADS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lplb::cuda {

// The most experts whose counters fit in a block's shared memory.
constexpr int32_t kMaxCounted = 8192;

// Counts the tokens of each of `batch` rows: counts [batch, n_logical + 1], invalid ids last.
// Index is int32_t, int64_t, uint8_t or uint16_t.
template <typename Index>
cudaError_t LaunchCount(const Index* indices, int64_t batch, int64_t n_tokens, int32_t n_logical,
                        int32_t* counts, cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_LOADS_H_
