// rebalance where no other rank is involved: its binding and checks, for both platforms.
#ifndef LPLB_XLA_FFI_BALANCER_H_
#define LPLB_XLA_FFI_BALANCER_H_

#include "xla_ffi/checks.h"

namespace lplb {

inline auto RebalanceBinding() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("ep_size")
      .Attr<int64_t>("positions")
      .Arg<ffi::AnyBuffer>()                    // indices [..., n_tokens]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // phy2log [..., n_physical]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // log2phy [..., n_logical, max_replicas]
      .Arg<ffi::Buffer<ffi::DataType::S32>>()   // r2o [..., group_size, n_columns]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // physical [..., n_tokens]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // position [..., n_tokens or 0]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // slot_counts [..., n_physical or 0]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // quota [..., n_physical]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // max_load [..., n_groups]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // lower_bound [..., n_groups]
      .Ret<ffi::Buffer<ffi::DataType::S32>>()   // status [..., n_groups]
      .Ret<ffi::Buffer<ffi::DataType::S32>>();  // workspace [..., n_tiles, words]
}

struct RebalanceCall {
  int64_t batch;
  int64_t n_tokens;
  bool positions;
  Problem problem;
  SolveOperands in;  // loads are null: they are counted
  SolveResults out;
};

inline ffi::ErrorOr<RebalanceCall> CheckRebalance(int64_t ep_size, int64_t positions,
                                                  ffi::AnyBuffer indices, IntBuffer phy2log,
                                                  IntBuffer log2phy, IntBuffer r2o,
                                                  IntResult position, IntResult slot_counts,
                                                  IntResult quota, IntResult max_load,
                                                  IntResult lower_bound, IntResult status) {
  const auto placed =
      CheckPlaced(ep_size, {"indices", indices.dimensions(), 1}, phy2log, log2phy, r2o);
  if (placed.has_error()) return ffi::Unexpected(placed.error());
  const int64_t n_tokens = FromEnd(indices.dimensions(), 1);
  const auto wanted =
      CheckPositions(positions, position, slot_counts, n_tokens, placed->problem.n_physical);
  if (wanted.has_error()) return ffi::Unexpected(wanted.error());
  return RebalanceCall{placed->batch,
                       n_tokens,
                       *wanted,
                       placed->problem,
                       {nullptr, phy2log.typed_data(), log2phy.typed_data(), r2o.typed_data()},
                       {quota->typed_data(), max_load->typed_data(), lower_bound->typed_data(),
                        status->typed_data()}};
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_BALANCER_H_
