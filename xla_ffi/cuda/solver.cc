// solve on the GPU.
#include "xla_ffi/solver.h"

#include "cuda/solver.h"
#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/limits.h"

namespace lplb {
namespace {

ffi::Error RunSolve(const SolveCall& call, const OnDevice& on) {
  LPLB_RETURN_IF_ERROR(CheckElements(call));
  LPLB_RETURN_IF_ERROR(CheckSolverFits(call.problem));
  return FromCuda(
      cuda::LaunchSolve(call.problem, call.sources, call.batch, call.in, call.out, on.stream),
      "solve");
}

const Register solve({"lplb_solve", CudaHandler<SolveCall, RunSolve>});

}  // namespace
}  // namespace lplb
