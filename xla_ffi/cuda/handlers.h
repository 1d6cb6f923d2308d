// The CUDA handlers, and what they share.
#ifndef LPLB_XLA_FFI_CUDA_HANDLERS_H_
#define LPLB_XLA_FFI_CUDA_HANDLERS_H_

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/solver.h"
#include "xla_ffi/checks.h"

namespace lplb {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CountCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SolveCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(IpmCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AssignCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RebalanceCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SyncCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SyncedRebalanceCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(CommInitialize);

using Stream = ffi::PlatformStream<cudaStream_t>;

inline ffi::Error CheckSolves(const Problem& problem) {
  if (cuda::FitsOneBlock(problem)) return ffi::Error::Success();
  return Invalid("r2o: the CUDA solver takes groups of at most " +
                 std::to_string(cuda::kMaxGroupSize) +
                 " ranks whose experts fit a block's shared memory, got " +
                 std::to_string(problem.group_size) + " ranks with " +
                 std::to_string(problem.n_local) + " experts each");
}

inline ffi::Error FromCuda(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("lplb_jax: ") + step + ": " + cudaGetErrorString(error));
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_HANDLERS_H_
