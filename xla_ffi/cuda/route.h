// What the CUDA handlers of assign and rebalance share.
#ifndef LPLB_XLA_FFI_CUDA_ROUTE_H_
#define LPLB_XLA_FFI_CUDA_ROUTE_H_

#include "cuda/route.h"
#include "xla_ffi/checks.h"

namespace lplb {

inline cuda::IndexType IndexTypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::S64:
      return cuda::IndexType::kInt64;
    case ffi::DataType::U8:
      return cuda::IndexType::kUint8;
    case ffi::DataType::U16:
      return cuda::IndexType::kUint16;
    default:  // Tokens reads no others.
      return cuda::IndexType::kInt32;
  }
}

// The arguments that both have; `call` is an AssignCall or a RebalanceCall.
template <typename Call>
cuda::RouteArguments RouteArgumentsOf(const Call& call) {
  const Tokens& tokens = call.tokens;
  cuda::RouteArguments arguments = {};
  arguments.problem = call.problem;
  arguments.sources = call.sources;
  arguments.tokens = {tokens.indices,     tokens.physical, tokens.position,
                      tokens.slot_counts, tokens.n,        IndexTypeOf(tokens.type)};
  arguments.workspace = tokens.workspace;
  arguments.batch = call.batch;
  arguments.n_tiles = tokens.n_tiles;
  arguments.workspace_words = tokens.words;
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
