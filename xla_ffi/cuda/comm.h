// Communicators: what a process keeps of each on its devices, for the handlers that exchange
// counts.
#ifndef LPLB_XLA_FFI_CUDA_COMM_H_
#define LPLB_XLA_FFI_CUDA_COMM_H_

#include <nanobind/nanobind.h>

#include "cuda/sync.h"
#include "xla_ffi/checks.h"

namespace lplb {

// The peers of a device in communicator `id`.
ffi::ErrorOr<cuda::Peers> FindPeers(int64_t id, int32_t device);

// The functions with which lplb_jax/comm.py makes and closes communicators.
void DefineComm(nanobind::module_& module);

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_COMM_H_
