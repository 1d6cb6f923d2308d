// What _cuda lends to _bench, which has no kernels or communicators of its own.
#ifndef LPLB_XLA_FFI_CUDA_LAUNCHERS_H_
#define LPLB_XLA_FFI_CUDA_LAUNCHERS_H_

#include "cuda/batch_copies.h"
#include "cuda/ipm.h"
#include "cuda/route.h"
#include "cuda/solver.h"
#include "xla_ffi/cuda/comm.h"

namespace lplb {

struct Launchers {
  decltype(&cuda::LaunchSolve) solve;
  decltype(&cuda::LaunchPlaceCopies) place_copies;
  decltype(&cuda::LaunchIpm) ipm;
  decltype(&cuda::LaunchRebalance) rebalance;
  decltype(&cuda::LaunchSyncedRebalance) synced_rebalance;
  decltype(&LaunchSync) sync;
  decltype(&LaunchThere) there;
  decltype(&LaunchBack) back;
  decltype(&cuda::LaunchEmpty) empty;
  decltype(&FindRank) find_rank;
  decltype(&cudaGetErrorString) error_string;

  // The name of the capsule in which they travel.
  static constexpr const char* kCapsule = "lplb_jax._cuda.launchers";
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_LAUNCHERS_H_
