// count: tokens per expert.
#include "xla_ffi/loads.h"

#include <vector>

#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {

template <typename Index>
void Count(const Index* indices, int64_t n_tokens, int32_t n_logical, int32_t* counts) {
  // Tokens of one expert often follow one another; four tables keep their increments independent.
  constexpr int kTables = 4;
  const int32_t width = n_logical + 2;  // Ids −1 go to place 0.
  std::vector<int32_t> tables(static_cast<size_t>(kTables) * width);
  int64_t i = 0;
  for (; i + kTables <= n_tokens; i += kTables) {
    for (int t = 0; t < kTables; ++t) {
      ++tables[static_cast<size_t>(t) * width + 1 + ExpertOf(indices[i + t], n_logical)];
    }
  }
  for (; i < n_tokens; ++i) ++tables[1 + ExpertOf(indices[i], n_logical)];
  for (int32_t e = 0; e <= n_logical; ++e) {
    counts[e] = 0;
    for (int t = 0; t < kTables; ++t) counts[e] += tables[static_cast<size_t>(t) * width + 1 + e];
  }
}

template void Count(const int32_t*, int64_t, int32_t, int32_t*);
template void Count(const int64_t*, int64_t, int32_t, int32_t*);
template void Count(const uint8_t*, int64_t, int32_t, int32_t*);
template void Count(const uint16_t*, int64_t, int32_t, int32_t*);

namespace {

ffi::Error CountImpl(int64_t n_logical, ffi::AnyBuffer indices, IntResult counts) {
  const auto call = CheckCount(n_logical, indices, counts);
  if (call.has_error()) return call.error();
  return WithIndexType(indices.element_type(), [&](auto* type) {
    auto* tokens = static_cast<decltype(type)>(indices.untyped_data());
    for (int64_t b = 0; b < call->batch; ++b) {
      Count(tokens + b * call->n_tokens, call->n_tokens, call->n_logical,
            counts->typed_data() + b * (n_logical + 1));
    }
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(CountCpu, CountImpl, CountBinding());

}  // namespace lplb
