// Launcher of assign: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_ASSIGNMENT_H_
#define LPLB_CUDA_ASSIGNMENT_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"

namespace lplb::cuda {

// Tokens of `batch` rows, cut into n_tiles tiles each; workspace [batch, n_tiles, n_logical].
template <typename Index>
struct Tokens {
  const Index* indices;  // [batch, n_tokens]
  int32_t* physical;     // [batch, n_tokens]
  int32_t* workspace;
  int64_t batch;
  int64_t n_tokens;
  int64_t n_tiles;
};

// Index is int32_t, int64_t, uint8_t or uint16_t.
template <typename Index>
cudaError_t LaunchAssign(const Problem& problem, const Sources& sources, const AssignOperands& in,
                         bool proportional, const Tokens<Index>& tokens, cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_ASSIGNMENT_H_
