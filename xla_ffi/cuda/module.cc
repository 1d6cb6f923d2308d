#include "xla_ffi/module.h"

#include "cuda/ipm.h"
#include "xla_ffi/cuda/comm.h"
#include "xla_ffi/cuda/launchers.h"
#include "xla_ffi/cuda/limits.h"

namespace lplb {
namespace {

const Launchers launchers = {cuda::LaunchSolve,
                             cuda::LaunchPlaceCopies,
                             cuda::LaunchIpm,
                             cuda::LaunchRebalance,
                             cuda::LaunchSyncedRebalance,
                             LaunchSync,
                             LaunchThere,
                             LaunchBack,
                             cuda::LaunchEmpty,
                             FindRank,
                             cudaGetErrorString};

}  // namespace
}  // namespace lplb

NB_MODULE(_cuda, m) {
  lplb::DefineModule(m);
  lplb::DefineComm(m);
  lplb::DefineLimits(m);
  m.def("has_cusolverdx", lplb::cuda::HasCuSolverDx);
  m.attr("launchers") = nanobind::capsule(&lplb::launchers, lplb::Launchers::kCapsule);
}
