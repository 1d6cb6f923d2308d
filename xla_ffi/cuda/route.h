// What the CUDA handlers of assign and rebalance share.
#ifndef LPLB_XLA_FFI_CUDA_ROUTE_H_
#define LPLB_XLA_FFI_CUDA_ROUTE_H_

#include "cuda/route.h"
#include "xla_ffi/checks.h"

namespace lplb {

inline ffi::ErrorOr<cuda::IndexType> IndexTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::S32:
      return cuda::IndexType::kInt32;
    case ffi::DataType::S64:
      return cuda::IndexType::kInt64;
    case ffi::DataType::U8:
      return cuda::IndexType::kUint8;
    case ffi::DataType::U16:
      return cuda::IndexType::kUint16;
    default:
      return ffi::Unexpected(Invalid("indices: expected int32, int64, uint8 or uint16"));
  }
}

// The arguments that both have; `call` is an AssignCall or a RebalanceCall.
template <typename Call>
ffi::ErrorOr<cuda::RouteArguments> RouteArgumentsOf(const Call& call, ffi::AnyBuffer indices,
                                                    IntResult physical, IntResult position,
                                                    IntResult slot_counts, IntResult workspace) {
  const auto type = IndexTypeOf(indices.element_type());
  if (type.has_error()) return ffi::Unexpected(type.error());
  cuda::RouteArguments arguments = {};
  arguments.problem = call.problem;
  arguments.tokens = {indices.untyped_data(),
                      physical->typed_data(),
                      call.positions ? position->typed_data() : nullptr,
                      call.positions ? slot_counts->typed_data() : nullptr,
                      call.n_tokens,
                      *type};
  arguments.workspace = workspace->typed_data();
  arguments.batch = call.batch;
  arguments.n_tiles = static_cast<int32_t>(FromEnd(workspace->dimensions(), 2));
  arguments.workspace_words = FromEnd(workspace->dimensions(), 1);
  return arguments;
}

inline ffi::Error CheckRoute(const cuda::RouteArguments& arguments, cuda::Quotas quotas) {
  if (cuda::FitsRoute(arguments, quotas)) return ffi::Error::Success();
  const Problem& p = arguments.problem;
  return Invalid("the CUDA kernels take at most " + std::to_string(cuda::kMaxExperts) +
                 " experts whose tables fit a block's shared memory, got n_logical = " +
                 std::to_string(p.n_logical) + ", n_physical = " + std::to_string(p.n_physical) +
                 ", ep_size = " + std::to_string(p.ep_size));
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_ROUTE_H_
