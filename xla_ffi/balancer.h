// rebalance without other ranks: its call, for both platforms.
#ifndef LPLB_XLA_FFI_BALANCER_H_
#define LPLB_XLA_FFI_BALANCER_H_

#include "xla_ffi/batch_copies.h"
#include "xla_ffi/checks.h"
#include "xla_ffi/solver.h"

namespace lplb {

struct RebalanceCall {
  int64_t batch;
  Problem problem;
  Sources sources;  // of the counts that the call makes
  Tokens tokens;
  SolveOperands in;  // `loads` is null: the call counts them
  SolveResults out;
  ChosenCopies copies;
  Costs costs;  // without base_load, tokens are balanced

  explicit RebalanceCall(Frame& frame, bool has_costs = false) {
    ProblemSizes sizes(frame);
    sizes.ReadNodes(frame);
    const bool positions = frame.Flag("positions");
    if (has_costs) {
      costs.by_tile = ReadTile(frame);
    } else {
      copies.ReadFanOut(frame, 0);
    }
    tokens.ReadIndices(frame);
    batch = frame.batch();
    in.loads = nullptr;
    ReadPlacement(frame, sizes, in);
    if (has_costs) frame.Operand("base_load", {&sizes.ep_size}, &costs.base_load);
    problem = ProblemOf(frame, sizes);
    sources = {1, problem.n_logical + 1};
    tokens.ReadSlots(frame, positions, sizes);
    ReadSplit(frame, problem, sizes, ffi::DataType::S32, ffi::DataType::S32, out);
    if (has_costs) {
      if (problem.n_columns > 0) frame.Fail("r2o: expected no columns where tiles are balanced");
      Size n_groups = {"n_groups", problem.n_groups};
      frame.Result("max_tokens", {&n_groups}, &costs.max_tokens);
    }
    if (copies.fan_out > 0) {
      if (problem.n_columns > 0) frame.Fail("fan_out: expected 0 along a topology");
      copies.ReadTables(frame, problem, sizes);
    }
    tokens.ReadWorkspace(frame);
  }
};

// Where slots cost tiles and ranks have a base load, on any placement.
struct RebalanceCostsCall : RebalanceCall {
  explicit RebalanceCostsCall(Frame& frame) : RebalanceCall(frame, /*has_costs=*/true) {}
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_BALANCER_H_
