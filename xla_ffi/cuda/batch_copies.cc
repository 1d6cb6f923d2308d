// place_copies on the GPU.
#include "xla_ffi/batch_copies.h"

#include "cuda/batch_copies.h"
#include "cuda/graph_solver.h"
#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/limits.h"

namespace lplb {
namespace {

ffi::Error RunPlaceCopies(const CopiesCall& call, const OnDevice& on) {
  LPLB_RETURN_IF_ERROR(CheckElements(call));
  LPLB_RETURN_IF_ERROR(CheckCopiesFit(call.problem));
  return FromCuda(
      cuda::LaunchPlaceCopies(call.problem, call.sources, call.batch, call.in, call.copies.fan_out,
                              call.copies.width, call.copies.out, on.stream),
      "place_copies");
}

// The quotas to start from are in the place of those that are solved.
ffi::Error RunSolveCopies(const SolveCopiesCall& call, const OnDevice& on) {
  const Problem chosen = call.Chosen();
  LPLB_RETURN_IF_ERROR(CheckElements(call));
  LPLB_RETURN_IF_ERROR(CheckCopiesFit(call.problem));
  LPLB_RETURN_IF_ERROR(CheckSolverFits(chosen, cuda::GraphSolverBytes(chosen)));
  CopiesResults copies = call.copies.out;
  copies.tokens = call.split.quota;
  const cudaError_t error =
      cuda::LaunchPlaceCopies(call.problem, call.sources, call.batch, call.in, call.copies.fan_out,
                              call.copies.width, copies, on.stream);
  if (error != cudaSuccess) return FromCuda(error, "place_copies");
  const SolveOperands in = {call.in.loads, copies.phy2log, copies.log2phy, call.in.r2o};
  return FromCuda(cuda::LaunchSolveGraph(chosen, call.sources, call.batch, in, call.split,
                                         cuda::StartFrom::kQuotas, on.stream),
                  "solve");
}

const Register place_copies({"lplb_place_copies", CudaHandler<CopiesCall, RunPlaceCopies>});
const Register solve_copies({"lplb_solve_copies", CudaHandler<SolveCopiesCall, RunSolveCopies>});

}  // namespace
}  // namespace lplb
