// place_copies on the GPU.
#include "xla_ffi/batch_copies.h"

#include "cuda/batch_copies.h"
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

const Register place_copies({"lplb_place_copies", CudaHandler<CopiesCall, RunPlaceCopies>});

}  // namespace
}  // namespace lplb
