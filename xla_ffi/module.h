// The nanobind module that each platform exports: its targets and what they were built against.
#ifndef LPLB_XLA_FFI_MODULE_H_
#define LPLB_XLA_FFI_MODULE_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "xla_ffi/handler.h"

namespace lplb {

// All targets of the module, in the form that jax.ffi.register_ffi_target takes.
inline nanobind::dict Handlers() {
  const auto capsule = [](Handler* handler) {
    return nanobind::capsule(reinterpret_cast<void*>(handler));
  };
  nanobind::dict handlers;
  for (const Target& target : AllTargets()) {
    if (target.initialize == nullptr) {
      handlers[target.name] = capsule(target.execute);
    } else {
      nanobind::dict stages;
      stages["initialize"] = capsule(target.initialize);
      stages["execute"] = capsule(target.execute);
      handlers[target.name] = stages;
    }
  }
  return handlers;
}

inline void DefineModule(nanobind::module_& module) {
  module.def("handlers", Handlers);
  module.def("jaxlib_version", [] { return std::string(LPLB_JAXLIB_VERSION); });
  module.def("ffi_version", [] {
    return std::to_string(XLA_FFI_API_MAJOR) + "." + std::to_string(XLA_FFI_API_MINOR);
  });
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_MODULE_H_
