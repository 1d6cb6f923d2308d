// assign on the GPU.
#include "xla_ffi/assignment.h"

#include "xla_ffi/cuda/handler.h"
#include "xla_ffi/cuda/limits.h"
#include "xla_ffi/cuda/route.h"

namespace lplb {
namespace {

ffi::Error RunAssign(const AssignCall& call, const OnDevice& on) {
  cuda::RouteArguments arguments = RouteArgumentsOf(call);
  arguments.given = call.in;
  arguments.proportional = call.proportional;
  LPLB_RETURN_IF_ERROR(CheckRouteFits(arguments, cuda::Quotas::kGiven));
  return FromCuda(cuda::LaunchAssign(arguments, on.stream), "assign");
}

const Register assign({"lplb_assign", CudaHandler<AssignCall, RunAssign>});

}  // namespace
}  // namespace lplb
