// CUDA handlers.
#ifndef LPLB_XLA_FFI_CUDA_HANDLER_H_
#define LPLB_XLA_FFI_CUDA_HANDLER_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "xla_ffi/handler.h"

namespace lplb {

// Where a call runs.
struct OnDevice {
  int32_t ordinal;
  cudaStream_t stream;
};

// The handler that reads a Call and launches it. XLA may capture the launch into a command buffer.
template <typename Call, ffi::Error (*run)(const Call&, const OnDevice&)>
XLA_FFI_Error* CudaHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(
      handler,
      [](ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes,
         int32_t ordinal, cudaStream_t stream) {
        return ReadAndRun<Call>(run, operands, results, attributes, OnDevice{ordinal, stream});
      },
      FrameBinding().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::PlatformStream<cudaStream_t>>(),
      {ffi::Traits::kCmdBufferCompatible});
  return handler(frame);
}

// solve and ipm kernels address batch elements by 32-bit products. `call` is a call of either.
template <typename Call>
ffi::Error CheckElements(const Call& call) {
  const Problem& p = call.problem;
  const int64_t words =
      std::max({int64_t{call.sources.n_sources} * call.sources.row,
                int64_t{p.n_physical} * p.max_replicas, int64_t{p.group_size} * p.n_columns});
  if (call.batch * words <= kInt32Max) return ffi::Error::Success();
  return Invalid("batch: expected arrays of less than 2^31 numbers, got " +
                 std::to_string(call.batch) + " elements of up to " + std::to_string(words));
}

inline ffi::Error FromCuda(cudaError_t error, const char* step) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("lplb_jax: ") + step + ": " + cudaGetErrorString(error));
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_HANDLER_H_
