// count: its binding and checks, for both platforms.
#ifndef LPLB_XLA_FFI_LOADS_H_
#define LPLB_XLA_FFI_LOADS_H_

#include "xla_ffi/checks.h"

namespace lplb {

inline auto CountBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("n_logical")
      .Arg<ffi::AnyBuffer>()                    // indices [..., n_tokens]
      .Ret<ffi::Buffer<ffi::DataType::S32>>();  // counts [..., n_logical + 1]
}

struct CountCall {
  int64_t batch;
  int64_t n_tokens;
  int32_t n_logical;
};

inline ffi::ErrorOr<CountCall> CheckCount(int64_t n_logical, ffi::AnyBuffer indices,
                                          IntResult counts) {
  const auto batch =
      CheckBatch({"indices", indices.dimensions(), 1}, Operand{"counts", counts->dimensions(), 1});
  if (batch.has_error()) return ffi::Unexpected(batch.error());
  if (n_logical < 1 || n_logical >= kInt32Max ||
      FromEnd(counts->dimensions(), 1) != n_logical + 1) {
    return ffi::Unexpected(Invalid("counts: expected [n_logical + 1]"));
  }
  return CountCall{*batch, FromEnd(indices.dimensions(), 1), static_cast<int32_t>(n_logical)};
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_LOADS_H_
