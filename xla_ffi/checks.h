// The operands that calls share, and the conditions that they must satisfy together.
#ifndef LPLB_XLA_FFI_CHECKS_H_
#define LPLB_XLA_FFI_CHECKS_H_

#include <cstdint>
#include <string>

#include "cuda/problem.h"
#include "xla_ffi/frame.h"

namespace lplb {

// The sizes of a problem, by the names that messages use.
struct ProblemSizes {
  Size ep_size = {"ep_size"};
  Size group_size = {"group_size"};
  Size n_columns = {"n_columns"};
  Size n_logical = {"n_logical"};
  Size n_physical = {"n_physical"};
  Size max_replicas = {"max_replicas"};
  int64_t node_size = Size::kUnknown;

  explicit ProblemSizes(Frame& frame) {
    ep_size.value = frame.Attribute("ep_size", 1, Size::kMost);
  }

  // For calls that have tokens; see Problem.
  void ReadNodes(Frame& frame) { node_size = frame.Attribute("node_size", 0, ep_size.value); }
};

// A placement and r2o, in this order.
inline void ReadPlacement(Frame& frame, ProblemSizes& s, SolveOperands& in) {
  frame.Operand("placement.phy2log", {&s.n_physical}, &in.phy2log);
  frame.Operand("placement.log2phy", {&s.n_logical, &s.max_replicas}, &in.log2phy);
  frame.Operand("r2o", {&s.group_size, &s.n_columns}, &in.r2o);
}

// The problem of these sizes, or one of zeros if they do not fit together. Without r2o, group_size
// and n_columns are 0.
inline Problem ProblemOf(Frame& frame, const ProblemSizes& s) {
  if (frame.failed()) return Problem();
  const bool has_r2o = s.group_size.value != Size::kUnknown;
  const int64_t ep_size = s.ep_size.value;
  const int64_t group_size = has_r2o ? s.group_size.value : 0;
  const int64_t n_columns = has_r2o ? s.n_columns.value : 0;
  const int64_t n_logical = s.n_logical.value;
  const int64_t n_physical = s.n_physical.value;
  const int64_t max_replicas = s.max_replicas.value;
  const bool along_topology = has_r2o ? n_columns > 0 : s.node_size == 0;
  const bool has_nodes = s.node_size != Size::kUnknown;
  bool fits = n_logical > 0 && n_physical % ep_size == 0 && n_physical >= n_logical &&
              n_physical * max_replicas <= Size::kMost;
  if (along_topology) {
    fits =
        fits && n_logical % ep_size == 0 && max_replicas >= 2 && (!has_nodes || s.node_size == 0);
  } else {
    fits = fits && max_replicas >= 1 && (!has_r2o || group_size == ep_size) &&
           (!has_nodes || (s.node_size > 0 && ep_size % s.node_size == 0));
  }
  if (fits && has_r2o && along_topology) {
    const int64_t n_redundant = (n_physical - n_logical) / ep_size;
    fits = group_size > 0 && ep_size % group_size == 0 && n_redundant % n_columns == 0 &&
           n_redundant <= n_logical / ep_size && group_size * n_columns <= Size::kMost;
  }
  if (!fits) {
    const auto number = [](int64_t value) { return std::to_string(value); };
    frame.Fail("placement, r2o and ep_size do not fit together: ep_size = " + number(ep_size) +
               ", n_logical = " + number(n_logical) + ", n_physical = " + number(n_physical) +
               ", max_replicas = " + number(max_replicas) + ", r2o [" + number(group_size) + ", " +
               number(n_columns) + "]" +
               (has_nodes ? ", node_size = " + number(s.node_size) : std::string()));
    return Problem();
  }
  Problem problem(s.ep_size.narrow(), static_cast<int32_t>(group_size),
                  static_cast<int32_t>(n_columns), s.n_logical.narrow(), s.n_physical.narrow(),
                  s.max_replicas.narrow());
  if (has_nodes) problem.node_size = static_cast<int32_t>(s.node_size);
  return problem;
}

// The shape of loads: one row of counts per source rank, or a single row.
struct SourceSizes {
  Size n_sources = {"1 or ep_size"};
  Size row = {"n_logical (+ 1)"};
};

inline Sources SourcesOf(Frame& frame, const SourceSizes& s, const Problem& problem) {
  if (frame.failed()) return Sources();
  const int64_t n_sources = s.n_sources.value;
  const int64_t row = s.row.value;
  if ((n_sources != 1 && n_sources != problem.ep_size) ||
      (row != problem.n_logical && row != problem.n_logical + 1) || n_sources * row > Size::kMost) {
    frame.Fail("loads: expected [1 or ep_size, n_logical (+ 1)], got [" +
               std::to_string(n_sources) + ", " + std::to_string(row) + "]");
  }
  return Sources{s.n_sources.narrow(), s.row.narrow()};
}

// The results of solve, ipm and rebalance. For ipm, quotas and loads may be float32.
inline void ReadSplit(Frame& frame, const Problem& problem, ProblemSizes& s, ffi::DataType quota,
                      ffi::DataType load, SolveResults& out) {
  Size n_groups = {"n_groups", problem.n_groups};
  frame.Result("quota", {quota}, {&s.n_physical}, &out.quota);
  frame.Result("max_load", {load}, {&n_groups}, &out.max_load);
  frame.Result("lower_bound", {load}, {&n_groups}, &out.lower_bound);
  frame.Result("status", {&n_groups}, &out.status);
}

// The tokens of a call, and the buffers for their slots.
struct Tokens {
  int64_t n = 0;
  ffi::DataType type = ffi::DataType::INVALID;
  const void* indices = nullptr;   // [batch, n]
  int32_t* physical = nullptr;     // [batch, n]
  int32_t* position = nullptr;     // [batch, n], or null
  int32_t* slot_counts = nullptr;  // [batch, n_physical], or null
  int32_t* workspace = nullptr;    // [batch, n_tiles, words], GPU only
  int32_t n_tiles = 0;
  int64_t words = 0;

  void ReadIndices(Frame& frame) {
    Size n_tokens = {"n_tokens"};
    type = frame.Operand(
        "indices", {ffi::DataType::S32, ffi::DataType::S64, ffi::DataType::U8, ffi::DataType::U16},
        {&n_tokens}, &indices);
    n = n_tokens.value;
  }

  void ReadSlots(Frame& frame, bool positions, ProblemSizes& s) {
    Size n_tokens = {"n_tokens", n};
    Size none = {"none", 0};
    frame.Result("physical", {&n_tokens}, &physical);
    frame.Result("position", {positions ? &n_tokens : &none}, &position);
    frame.Result("slot_counts", {positions ? &s.n_physical : &none}, &slot_counts);
    if (!positions) position = slot_counts = nullptr;
  }

  void ReadWorkspace(Frame& frame) {
    Size tiles = {"n_tiles"};
    Size words_of_tile = {"words"};
    frame.Result("workspace", {&tiles, &words_of_tile}, &workspace);
    n_tiles = tiles.narrow();
    words = words_of_tile.value;
  }
};

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
