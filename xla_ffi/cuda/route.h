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
    default:  // Tokens accepts no other type.
      return cuda::IndexType::kInt32;
  }
}

// The arguments that both share. `call` is an AssignCall or a RebalanceCall.
template <typename Call>
cuda::RouteArguments RouteArgumentsOf(const Call& call) {
  const Tokens& tokens = call.tokens;
  cuda::RouteArguments arguments = {};
  arguments.problem = call.problem;
  arguments.sources = call.sources;
  arguments.tokens = {tokens.indices,  tokens.n,        IndexTypeOf(tokens.type),
                      tokens.physical, tokens.position, tokens.slot_counts};
  arguments.workspace = tokens.workspace;
  arguments.batch = call.batch;
  arguments.n_tiles = tokens.n_tiles;
  arguments.workspace_words = tokens.words;
  return arguments;
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CUDA_ROUTE_H_
