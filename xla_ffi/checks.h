// Shapes of the operands: what the CPU and the CUDA handlers check before they compute.
#ifndef LPLB_XLA_FFI_CHECKS_H_
#define LPLB_XLA_FFI_CHECKS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/problem.h"
#include "xla/ffi/api/ffi.h"

namespace lplb {

namespace ffi = ::xla::ffi;

using Dimensions = ffi::Span<const int64_t>;
using IntBuffer = ffi::Buffer<ffi::DataType::S32>;
using IntResult = ffi::ResultBuffer<ffi::DataType::S32>;

inline ffi::Error Invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "lplb_jax: " + message);
}

// Product of all but the last `rank` dimensions: operands come with any leading batch dimensions.
inline int64_t BatchOf(Dimensions dims, size_t rank) {
  int64_t batch = 1;
  for (size_t i = 0; i + rank < dims.size(); ++i) batch *= dims[i];
  return batch;
}

inline int64_t FromEnd(Dimensions dims, size_t i) { return dims[dims.size() - i]; }

// One operand: its name for messages, its dimensions, and its rank without batch dimensions.
struct Operand {
  const char* name;
  Dimensions dims;
  size_t rank;
};

// Checks ranks and that all operands agree on the batch, which it returns.
template <typename... Operands>
ffi::ErrorOr<int64_t> CheckBatch(const Operand& first, const Operands&... rest) {
  if (first.dims.size() < first.rank) {
    return ffi::Unexpected(Invalid(std::string(first.name) + ": too few dimensions"));
  }
  const int64_t batch = BatchOf(first.dims, first.rank);
  for (const Operand& operand : {rest...}) {
    if (operand.dims.size() < operand.rank || BatchOf(operand.dims, operand.rank) != batch) {
      return ffi::Unexpected(Invalid(std::string(operand.name) +
                                     ": batch dimensions differ from those of " + first.name));
    }
  }
  return batch;
}

// A problem from its operands, checked; group_size and n_columns stay 0 where there is no r2o.
inline ffi::ErrorOr<Problem> CheckProblem(int64_t ep_size, int64_t n_physical, Dimensions log2phy,
                                          std::optional<Dimensions> r2o) {
  const int64_t n_logical = FromEnd(log2phy, 2);
  const int64_t max_replicas = FromEnd(log2phy, 1);
  const int64_t group_size = r2o ? FromEnd(*r2o, 2) : 0;
  const int64_t n_columns = r2o ? FromEnd(*r2o, 1) : 0;
  bool fits = ep_size > 0 && n_logical > 0 && n_logical % ep_size == 0 &&
              n_physical % ep_size == 0 && n_physical >= n_logical && max_replicas >= 2 &&
              n_physical * max_replicas <= kInt32Max;
  if (fits && r2o) {
    const int64_t n_redundant = (n_physical - n_logical) / ep_size;
    fits = group_size > 0 && ep_size % group_size == 0 && n_columns > 0 &&
           n_redundant % n_columns == 0 && n_redundant <= n_logical / ep_size;
  }
  if (!fits) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    return ffi::Unexpected(
        Invalid("placement, r2o and ep_size do not fit together: ep_size = " + number(ep_size) +
                ", n_logical = " + number(n_logical) + ", n_physical = " + number(n_physical) +
                ", r2o [" + number(group_size) + ", " + number(n_columns) + "]"));
  }
  return Problem(static_cast<int32_t>(ep_size), static_cast<int32_t>(group_size),
                 static_cast<int32_t>(n_columns), static_cast<int32_t>(n_logical),
                 static_cast<int32_t>(n_physical), static_cast<int32_t>(max_replicas));
}

struct PlacedProblem {
  int64_t batch;
  Problem problem;
};

// What solve, ipm and rebalance share: `first`, the placement and r2o, and any `rest`, in one
// batch.
template <typename... Rest>
ffi::ErrorOr<PlacedProblem> CheckPlaced(int64_t ep_size, const Operand& first, IntBuffer phy2log,
                                        IntBuffer log2phy, IntBuffer r2o, const Rest&... rest) {
  const auto batch = CheckBatch(first, Operand{"placement.phy2log", phy2log.dimensions(), 1},
                                Operand{"placement.log2phy", log2phy.dimensions(), 2},
                                Operand{"r2o", r2o.dimensions(), 2}, rest...);
  if (batch.has_error()) return ffi::Unexpected(batch.error());
  const auto problem = CheckProblem(ep_size, FromEnd(phy2log.dimensions(), 1), log2phy.dimensions(),
                                    r2o.dimensions());
  if (problem.has_error()) return ffi::Unexpected(problem.error());
  return PlacedProblem{*batch, *problem};
}

// The rows of counts that belong to `problem`.
inline ffi::ErrorOr<Sources> CheckSources(Dimensions counts, const Problem& problem) {
  const int64_t n_sources = FromEnd(counts, 2);
  const int64_t row = FromEnd(counts, 1);
  if ((n_sources != 1 && n_sources != problem.ep_size) ||
      (row != problem.n_logical && row != problem.n_logical + 1)) {
    return ffi::Unexpected(Invalid("loads: expected [1 or ep_size, n_logical (+ 1)], got [" +
                                   std::to_string(n_sources) + ", " + std::to_string(row) + "]"));
  }
  return Sources{static_cast<int32_t>(n_sources), static_cast<int32_t>(row)};
}

// Whether positions and slot counts are asked for; else both buffers are empty.
inline ffi::ErrorOr<bool> CheckPositions(int64_t positions, IntResult position,
                                         IntResult slot_counts, int64_t n_tokens,
                                         int64_t n_physical) {
  if (positions == 0) return false;
  if (FromEnd(slot_counts->dimensions(), 1) == n_physical &&
      FromEnd(position->dimensions(), 1) == n_tokens) {
    return true;
  }
  return ffi::Unexpected(Invalid("position and counts: expected [n_tokens] and [n_physical]"));
}

// Calls `function` with a null pointer of the indices' element type.
template <typename Function>
ffi::Error WithIndexType(ffi::DataType type, Function&& function) {
  switch (type) {
    case ffi::DataType::S32:
      return function(static_cast<const int32_t*>(nullptr));
    case ffi::DataType::S64:
      return function(static_cast<const int64_t*>(nullptr));
    case ffi::DataType::U8:
      return function(static_cast<const uint8_t*>(nullptr));
    case ffi::DataType::U16:
      return function(static_cast<const uint16_t*>(nullptr));
    default:
      return Invalid("indices: expected int32, int64, uint8 or uint16");
  }
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CHECKS_H_
