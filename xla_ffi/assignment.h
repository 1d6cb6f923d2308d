// assign: its binding and checks, for both platforms.
#ifndef LPLB_XLA_FFI_ASSIGNMENT_H_
#define LPLB_XLA_FFI_ASSIGNMENT_H_

#include "xla_ffi/checks.h"

namespace lplb {

inline auto AssignBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("ep_size")
      .Attr<int64_t>("proportional")
      .Attr<int64_t>("positions")
      .Arg<ffi::AnyBuffer>()                    // indices [..., n_tokens]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // loads [..., n_sources, row]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // quota [..., n_physical]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // log2phy [..., n_logical, max_replicas]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // rank [...]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // physical [..., n_tokens]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // position [..., n_tokens or 0]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // slot_counts [..., n_physical or 0]
      .Ret<ffi::Buffer<ffi::DataType::S32>>();  // workspace [..., n_tiles, words]
}

struct AssignCall {
  int64_t batch;
  int64_t n_tokens;
  bool positions;
  Problem problem;
  Sources sources;
  AssignOperands in;
};

inline ffi::ErrorOr<AssignCall> CheckAssign(int64_t ep_size, int64_t positions,
                                            ffi::AnyBuffer indices, IntBuffer counts,
                                            IntBuffer quota, IntBuffer log2phy, IntBuffer rank,
                                            IntResult position, IntResult slot_counts) {
  const auto batch = CheckBatch(
      {"indices", indices.dimensions(), 1}, Operand{"loads", counts.dimensions(), 2},
      Operand{"split.quota", quota.dimensions(), 1},
      Operand{"placement.log2phy", log2phy.dimensions(), 2}, Operand{"rank", rank.dimensions(), 0});
  if (batch.has_error()) return ffi::Unexpected(batch.error());
  const auto problem =
      CheckProblem(ep_size, FromEnd(quota.dimensions(), 1), log2phy.dimensions(), std::nullopt);
  if (problem.has_error()) return ffi::Unexpected(problem.error());
  const auto sources = CheckSources(counts.dimensions(), *problem);
  if (sources.has_error()) return ffi::Unexpected(sources.error());
  const int64_t n_tokens = FromEnd(indices.dimensions(), 1);
  const auto wanted =
      CheckPositions(positions, position, slot_counts, n_tokens, problem->n_physical);
  if (wanted.has_error()) return ffi::Unexpected(wanted.error());
  return AssignCall{
      *batch,   n_tokens,
      *wanted,  *problem,
      *sources, {counts.typed_data(), quota.typed_data(), log2phy.typed_data(), rank.typed_data()}};
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_ASSIGNMENT_H_
