#include "xla_ffi/module.h"

#include "xla_ffi/cpu/handlers.h"

NB_MODULE(_cpu, m) {
  lplb::DefineModule(
      m, {lplb::CountCpu, lplb::SolveCpu, lplb::IpmCpu, lplb::AssignCpu, lplb::RebalanceCpu});
}
