// Launches place_copies: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_BATCH_COPIES_H_
#define LPLB_CUDA_BATCH_COPIES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.h"

namespace lplb::cuda {

// The least shared memory of the block that chooses one batch element's copies.
int64_t PlaceCopiesBytes(const Problem& problem);

// Chooses every batch element's copies, a block each; in.r2o is not read. `fan_out`: copies of its
// experts that a rank may send; `width`: places of an expert in out.log2phy.
cudaError_t LaunchPlaceCopies(const Problem& problem, const Sources& sources, int64_t batch,
                              const SolveOperands& in, int32_t fan_out, int32_t width,
                              const CopiesResults& out, cudaStream_t stream);

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_BATCH_COPIES_H_
