// The nanobind module that each platform exports: its handlers and what they were built against.
#ifndef LPLB_XLA_FFI_MODULE_H_
#define LPLB_XLA_FFI_MODULE_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "xla/ffi/api/c_api.h"

namespace lplb {

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

inline void DefineModule(nanobind::module_& module, Handler* count, Handler* solve, Handler* assign,
                         Handler* rebalance) {
  module.def("handlers", [=] {
    nanobind::dict handlers;
    handlers["lplb_count"] = nanobind::capsule(reinterpret_cast<void*>(count));
    handlers["lplb_solve"] = nanobind::capsule(reinterpret_cast<void*>(solve));
    handlers["lplb_assign"] = nanobind::capsule(reinterpret_cast<void*>(assign));
    handlers["lplb_rebalance"] = nanobind::capsule(reinterpret_cast<void*>(rebalance));
    return handlers;
  });
  module.def("jaxlib_version", [] { return std::string(LPLB_JAXLIB_VERSION); });
  module.def("ffi_version", [] {
    return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  });
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_MODULE_H_
