// The nanobind module that each platform exports: its handlers and what they were built against.
#ifndef LPLB_XLA_FFI_MODULE_H_
#define LPLB_XLA_FFI_MODULE_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "xla/ffi/api/c_api.h"

namespace lplb {

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

struct Handlers {
  Handler* count;
  Handler* solve;
  Handler* ipm;
  Handler* assign;
  Handler* rebalance;
};

inline nanobind::capsule CapsuleOf(Handler* handler) {
  return nanobind::capsule(reinterpret_cast<void*>(handler));
}

// `add(handlers)` puts in those that only one platform has.
inline void DefineModule(
    nanobind::module_& module, const Handlers& all,
    void (*add)(nanobind::dict&) = [](nanobind::dict&) {}) {
  module.def("handlers", [=] {
    nanobind::dict handlers;
    handlers["lplb_count"] = CapsuleOf(all.count);
    handlers["lplb_solve"] = CapsuleOf(all.solve);
    handlers["lplb_ipm"] = CapsuleOf(all.ipm);
    handlers["lplb_assign"] = CapsuleOf(all.assign);
    handlers["lplb_rebalance"] = CapsuleOf(all.rebalance);
    add(handlers);
    return handlers;
  });
  module.def("jaxlib_version", [] { return std::string(LPLB_JAXLIB_VERSION); });
  module.def("ffi_version", [] {
    return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  });
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_MODULE_H_
