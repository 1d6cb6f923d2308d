// Explains in sentences what a GPU has no room for.
#ifndef LPLB_XLA_FFI_CUDA_LIMITS_H_
#define LPLB_XLA_FFI_CUDA_LIMITS_H_

#include <nanobind/nanobind.h>

#include "cuda/ipm.h"
#include "cuda/route.h"
#include "xla_ffi/checks.h"

namespace lplb {

// Whether the current device can run the launchers behind each check: solve and rebalance, assign
// and rebalance, place_copies, ipm.
ffi::Error CheckSolverFits(const Problem& problem, int64_t bytes);
ffi::Error CheckRouteFits(const cuda::RouteArguments& arguments, cuda::Quotas quotas);
ffi::Error CheckCopiesFit(const Problem& problem);
ffi::Error CheckIpmFits(const Problem& problem, const IpmOptions& options);

// Python's view: devices, real or made up, and the same sentences about them, for tests.
void DefineLimits(nanobind::module_& m);

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_LIMITS_H_
