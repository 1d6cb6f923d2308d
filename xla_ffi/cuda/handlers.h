// The CUDA handlers, and what they share.
#ifndef LPLB_XLA_FFI_CUDA_HANDLERS_H_
#define LPLB_XLA_FFI_CUDA_HANDLERS_H_

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/loads.h"
#include "xla_ffi/checks.h"

namespace lplb {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CountCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SolveCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(IpmCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AssignCuda);

using Stream = ffi::PlatformStream<cudaStream_t>;

inline ffi::Error CheckExperts(int64_t n_logical) {
  if (n_logical <= cuda::kMaxExperts) return ffi::Error::Success();
  return Invalid("n_logical: the CUDA kernels take at most " + std::to_string(cuda::kMaxExperts) +
                 " experts, got " + std::to_string(n_logical));
}

inline ffi::Error FromCuda(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("lplb_jax: ") + step + ": " + cudaGetErrorString(error));
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_HANDLERS_H_
