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
  const auto placed = CheckPlaced(ep_size, {"loads", loads.dimensions(), 2}, phy2log, log2phy, r2o);
  if (placed.has_error()) return ffi::Unexpected(placed.error());
  const auto sources = CheckSources(loads.dimensions(), placed->problem);
  if (sources.has_error()) return ffi::Unexpected(sources.error());
  return SolveCall{
      placed->batch,
      placed->problem,
      *sources,
      {loads.typed_data(), phy2log.typed_data(), log2phy.typed_data(), r2o.typed_data()},
      {quota->typed_data(), max_load->typed_data(), lower_bound->typed_data(),
       status->typed_data()}};
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_SOLVER_H_
