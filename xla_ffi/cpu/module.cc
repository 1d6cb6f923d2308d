#include "xla_ffi/module.h"

NB_MODULE(_cpu, m) { lplb::DefineModule(m); }
