// CPU handlers.
#ifndef LPLB_XLA_FFI_CPU_HANDLER_H_
#define LPLB_XLA_FFI_CPU_HANDLER_H_

#include "xla_ffi/handler.h"

namespace lplb {

// The handler that reads a Call and runs it.
template <typename Call, ffi::Error (*run)(const Call&)>
XLA_FFI_Error* CpuHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(
      handler,
      [](ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes) {
        return ReadAndRun<Call>(run, operands, results, attributes);
      },
      FrameBinding());
  return handler(frame);
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_HANDLER_H_
