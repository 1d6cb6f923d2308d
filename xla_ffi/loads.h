// count: its call, for both platforms.
#ifndef LPLB_XLA_FFI_LOADS_H_
#define LPLB_XLA_FFI_LOADS_H_

#include "xla_ffi/checks.h"

namespace lplb {

struct CountCall {
  Tokens tokens;
  int64_t batch;
  int32_t n_logical;
  int32_t* counts;  // [..., n_logical + 1]

  explicit CountCall(Frame& frame) {
    n_logical = static_cast<int32_t>(frame.Attribute("n_logical", 1, Size::kMost));
    tokens.ReadIndices(frame);
    batch = frame.batch();
    Size row = {"n_logical + 1", n_logical + 1};
    frame.Result("counts", {&row}, &counts);
  }
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_LOADS_H_
