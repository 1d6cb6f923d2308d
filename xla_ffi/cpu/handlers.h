// The CPU handlers.
#ifndef LPLB_XLA_FFI_CPU_HANDLERS_H_
#define LPLB_XLA_FFI_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace lplb {

XLA_FFI_DECLARE_HANDLER_SYMBOL(CountCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(SolveCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(IpmCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(AssignCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RebalanceCpu);

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_HANDLERS_H_
