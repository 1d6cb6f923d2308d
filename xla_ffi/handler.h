// Handlers, and the list of them. Each topic's file ends with one line per handler.
#ifndef LPLB_XLA_FFI_HANDLER_H_
#define LPLB_XLA_FFI_HANDLER_H_

#include <exception>
#include <new>
#include <string>
#include <vector>

#include "xla_ffi/frame.h"

namespace lplb {

using Handler = XLA_FFI_Error*(XLA_FFI_CallFrame*);

// One FFI target of this module's platform.
struct Target {
  const char* name;
  Handler* execute;
  Handler* initialize = nullptr;  // runs before every execution, also of a captured one
};

inline std::vector<Target>& AllTargets() {
  static std::vector<Target> targets;
  return targets;
}

// Adds a target to the list when the module is loaded.
struct Register {
  explicit Register(const Target& target) { AllTargets().push_back(target); }
};

// Calls `function` and turns its exceptions into errors: XLA's frames must not be unwound.
template <typename Function>
ffi::Error WithoutExceptions(Function&& function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lplb_jax: out of host memory");
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("lplb_jax: ") + error.what());
  } catch (...) {
    return ffi::Error::Internal("lplb_jax: unknown exception");
  }
}

// Reads a Call, which a Frame constructs, and runs it; `context` is what the platform adds.
template <typename Call, typename Run, typename... Context>
ffi::Error ReadAndRun(Run run, ffi::RemainingArgs operands, ffi::RemainingRets results,
                      ffi::Dictionary attributes, const Context&... context) {
  return WithoutExceptions([&] {
    Frame frame(operands, results, attributes);
    const Call call(frame);
    LPLB_RETURN_IF_ERROR(frame.Finish());
    return run(call, context...);
  });
}

inline auto FrameBinding() {
  return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs<ffi::Dictionary>();
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_HANDLER_H_
