// count: tokens per expert.
#include "xla_ffi/loads.h"

#include <vector>

#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {

template <typename Index>
void Count(const Index* indices, int64_t n_tokens, int32_t n_logical, int32_t* counts) {
  // Tokens of one expert often come in runs; four tables keep their increments independent.
  constexpr size_t kTables = 4;
  const size_t width = static_cast<size_t>(n_logical) + 2;  // Id −1 counts in place 0.
  std::vector<int32_t> tables(kTables * width);
  int64_t i = 0;
  for (; i + int64_t{kTables} <= n_tokens; i += kTables) {
    for (size_t t = 0; t < kTables; ++t) {
      ++tables[t * width + 1 + ExpertOf(indices[i + t], n_logical)];
    }
  }
  for (; i < n_tokens; ++i) ++tables[1 + ExpertOf(indices[i], n_logical)];
  for (int32_t e = 0; e <= n_logical; ++e) {
    counts[e] = 0;
    for (size_t t = 0; t < kTables; ++t) counts[e] += tables[t * width + 1 + e];
  }
}

template void Count(const int32_t*, int64_t, int32_t, int32_t*);
template void Count(const int64_t*, int64_t, int32_t, int32_t*);
template void Count(const uint8_t*, int64_t, int32_t, int32_t*);
template void Count(const uint16_t*, int64_t, int32_t, int32_t*);

namespace {

ffi::Error RunCount(const CountCall& call) {
  return WithIndexType(call.tokens.type, [&](auto* type) {
    auto* indices = static_cast<decltype(type)>(call.tokens.indices);
    for (int64_t b = 0; b < call.batch; ++b) {
      Count(indices + b * call.tokens.n, call.tokens.n, call.n_logical,
            call.counts + b * (call.n_logical + 1));
    }
    return ffi::Error::Success();
  });
}

const Register count({"lplb_count", CpuHandler<CountCall, RunCount>});

}  // namespace
}  // namespace lplb
