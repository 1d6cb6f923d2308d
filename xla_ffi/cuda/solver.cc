// solve on the GPU.
#include "xla_ffi/solver.h"

#include "cuda/solver.h"
#include "cuda/tiles.h"
#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/limits.h"

namespace lplb {
namespace {

ffi::Error RunSolve(const SolveCall& call, const OnDevice& on) {
  LPLB_RETURN_IF_ERROR(CheckElements(call));
  LPLB_RETURN_IF_ERROR(CheckSolverFits(call.problem, cuda::SolveSharedBytes(call.problem)));
  return FromCuda(
      cuda::LaunchSolve(call.problem, call.sources, call.batch, call.in, call.out, on.stream),
      "solve");
}

ffi::Error RunSolveCosts(const SolveCostsCall& call, const OnDevice& on) {
  LPLB_RETURN_IF_ERROR(CheckElements(call));
  LPLB_RETURN_IF_ERROR(CheckSolverFits(call.problem, cuda::SolveCostsSharedBytes(call.problem)));
  return FromCuda(cuda::LaunchSolveCosts(call.problem, call.sources, call.batch, call.in,
                                         call.costs, call.out, on.stream),
                  "solve");
}

const Register solve({"lplb_solve", CudaHandler<SolveCall, RunSolve>});
const Register solve_costs({"lplb_solve_costs", CudaHandler<SolveCostsCall, RunSolveCosts>});

}  // namespace
}  // namespace lplb
