// ipm: its binding and checks, for both platforms.
#ifndef LPLB_XLA_FFI_IPM_H_
#define LPLB_XLA_FFI_IPM_H_

#include "cuda/interior.h"
#include "xla_ffi/checks.h"

namespace lplb {

inline auto IpmBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("ep_size")
      .Attr<int64_t>("weighted")
      .Attr<int64_t>("repair")
      .Attr<int64_t>("cusolverdx")
      .Arg<ffi::AnyBuffer>()                    // loads [..., n_sources, row], int32 or float32
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // phy2log [..., n_physical]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // log2phy [..., n_logical, max_replicas]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // r2o [..., group_size, n_columns]
      .Arg<ffi::Buffer<ffi::DataType::F32>>()   // weights [..., group_size]
      .Ret<ffi::AnyBuffer>()                    // quota [..., n_physical], as loads
      .Ret<ffi::AnyBuffer>()                    // max_load [..., n_groups]
      .Ret<ffi::AnyBuffer>()                    // lower_bound [..., n_groups]
      .Ret<ffi::Buffer<ffi::DataType::S32>>();  // status [..., n_groups]
}

struct IpmCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  IpmOptions options;
  IpmOperands in;
  SolveResults out;
};

using AnyResult = ffi::Result<ffi::AnyBuffer>;

inline ffi::ErrorOr<IpmCall> CheckIpm(int64_t ep_size, int64_t weighted, int64_t repair,
                                      int64_t cusolverdx, ffi::AnyBuffer loads, IntBuffer phy2log,
                                      IntBuffer log2phy, IntBuffer r2o,
                                      ffi::Buffer<ffi::DataType::F32> weights, AnyResult quota,
                                      AnyResult max_load, AnyResult lower_bound, IntResult status) {
  const auto placed = CheckPlaced(ep_size, {"loads", loads.dimensions(), 2}, phy2log, log2phy, r2o,
                                  Operand{"rank_weights", weights.dimensions(), 1});
  if (placed.has_error()) return ffi::Unexpected(placed.error());
  const auto sources = CheckSources(loads.dimensions(), placed->problem);
  if (sources.has_error()) return ffi::Unexpected(sources.error());
  if (FromEnd(weights.dimensions(), 1) != placed->problem.group_size) {
    return ffi::Unexpected(Invalid("rank_weights: expected [group_size]"));
  }
  const bool floats = loads.element_type() == ffi::DataType::F32;
  const IpmOptions options = {floats, weighted != 0, repair != 0, cusolverdx != 0};
  const auto value = options.float_loads_out() ? ffi::DataType::F32 : ffi::DataType::S32;
  if ((!floats && loads.element_type() != ffi::DataType::S32) ||
      quota->element_type() != loads.element_type() || max_load->element_type() != value ||
      lower_bound->element_type() != value) {
    return ffi::Unexpected(Invalid("loads: expected int32 or float32, and results to match"));
  }
  return IpmCall{placed->batch,
                 placed->problem,
                 *sources,
                 options,
                 {{static_cast<const int32_t*>(loads.untyped_data()), phy2log.typed_data(),
                   log2phy.typed_data(), r2o.typed_data()},
                  weights.typed_data()},
                 {static_cast<int32_t*>(quota->untyped_data()),
                  static_cast<int32_t*>(max_load->untyped_data()),
                  static_cast<int32_t*>(lower_bound->untyped_data()), status->typed_data()}};
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_IPM_H_
