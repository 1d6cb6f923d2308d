// solve: its binding and checks, for both platforms.
#ifndef LPLB_XLA_FFI_SOLVER_H_
#define LPLB_XLA_FFI_SOLVER_H_

#include "xla_ffi/checks.h"

namespace lplb {

inline auto SolveBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("ep_size")
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // loads [..., n_sources, row]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // phy2log [..., n_physical]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // log2phy [..., n_logical, max_replicas]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // r2o [..., group_size, n_columns]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // quota [..., n_physical]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // max_load [..., n_groups]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // lower_bound [..., n_groups]
      .Ret<ffi::Buffer<ffi::DataType::S32>>();  // status [..., n_groups]
}

struct SolveCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  SolveOperands in;
  SolveResults out;
};

inline ffi::ErrorOr<SolveCall> CheckSolve(int64_t ep_size, IntBuffer loads, IntBuffer phy2log,
                                          IntBuffer log2phy, IntBuffer r2o, IntResult quota,
                                          IntResult max_load, IntResult lower_bound,
                                          IntResult status) {
  const auto batch = CheckBatch(
      {"loads", loads.dimensions(), 2}, Operand{"placement.phy2log", phy2log.dimensions(), 1},
      Operand{"placement.log2phy", log2phy.dimensions(), 2}, Operand{"r2o", r2o.dimensions(), 2});
  if (batch.has_error()) return ffi::Unexpected(batch.error());
  const auto problem = CheckProblem(ep_size, FromEnd(phy2log.dimensions(), 1), log2phy.dimensions(),
                                    r2o.dimensions());
  if (problem.has_error()) return ffi::Unexpected(problem.error());
  const auto sources = CheckSources(loads.dimensions(), *problem);
  if (sources.has_error()) return ffi::Unexpected(sources.error());
  return SolveCall{
      *batch,
      *problem,
      *sources,
      {loads.typed_data(), phy2log.typed_data(), log2phy.typed_data(), r2o.typed_data()},
      {quota->typed_data(), max_load->typed_data(), lower_bound->typed_data(),
       status->typed_data()}};
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_SOLVER_H_
