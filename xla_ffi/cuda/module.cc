#include "xla_ffi/module.h"

#include "xla_ffi/cuda/handlers.h"

NB_MODULE(_cuda, m) { lplb::DefineModule(m, lplb::CountCuda, lplb::SolveCuda, lplb::AssignCuda); }
