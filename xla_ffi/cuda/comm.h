// Communicators: what a process keeps for each of them on its devices, for the handlers that
// exchange counts and tokens.
#ifndef LPLB_XLA_FFI_CUDA_COMM_H_
#define LPLB_XLA_FFI_CUDA_COMM_H_

#include <nanobind/nanobind.h>

#include <array>
#include <memory>

#include "cuda/exchange.h"
#include "cuda/sync.h"
#include "xla_ffi/cuda/flight.h"
#include "xla_ffi/handler.h"

namespace lplb {

// The kernels of nvshmem/exchange_put.cu.
struct PutKernels {
  const void* there;
  std::array<const void*, cuda::kRowTypes> back;  // by RowType
};

// A device's part in a communicator.
struct CommRank {
  cuda::Peers peers;
  cuda::PutPeers put;
  const void* put_kernel;            // null where all peers are mapped
  cuda::Exchange exchange;           // has no ranks if there are no windows that are mapped
  cuda::PutExchange put_exchange;    // has no ranks if there are no windows to put to
  PutKernels put_kernels;            // null likewise
  std::shared_ptr<Flights> flights;  // null if there is no room for copies

  // What the windows have room for; has no ranks if there are none.
  const cuda::WindowSizes& window() const {
    if (put_kernel != nullptr) return put_exchange.shape;
    return exchange.shape;
  }
};

ffi::ErrorOr<CommRank> FindRank(int64_t id, int32_t device);

// The initialize stage of targets with an attribute `comm`. It reports the communicator's failures
// before every execution, also of programs captured into a command buffer.
XLA_FFI_Error* InitializeComm(XLA_FFI_CallFrame* frame);

// sync_loads as this rank.
inline cudaError_t LaunchSync(const CommRank& of, const int32_t* rank, const int32_t* counts,
                              int32_t n, int32_t* matrix, cudaStream_t stream) {
  if (of.put_kernel == nullptr) {
    return cuda::LaunchSync(of.peers, rank, counts, n, matrix, stream);
  }
  return cuda::LaunchSyncPut(of.put_kernel, of.peers, of.put, rank, counts, n, matrix, stream);
}

// Exchanges of tokens as this rank, which has windows.
inline cudaError_t LaunchThere(const CommRank& of, const cuda::ThereArguments& arguments,
                               const cuda::ExchangeOptions& options, cudaStream_t stream) {
  if (of.put_kernel == nullptr) return cuda::LaunchThere(of.exchange, arguments, options, stream);
  return cuda::LaunchTherePut(of.put_kernels.there, of.put_exchange, arguments, options, stream);
}
inline cudaError_t LaunchBack(const CommRank& of, const cuda::BackArguments& arguments,
                              const cuda::ExchangeOptions& options, cudaStream_t stream) {
  if (of.put_kernel == nullptr) return cuda::LaunchBack(of.exchange, arguments, options, stream);
  const void* kernel = of.put_kernels.back[static_cast<size_t>(arguments.type)];
  return cuda::LaunchBackPut(kernel, of.put_exchange, arguments, options, stream);
}

// Defines the functions with which lplb_jax/comm.py makes and closes communicators.
void DefineComm(nanobind::module_& module);

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_COMM_H_
