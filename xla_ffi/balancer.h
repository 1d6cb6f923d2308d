// rebalance without other ranks: its call, for both platforms.
#ifndef LPLB_XLA_FFI_BALANCER_H_
#define LPLB_XLA_FFI_BALANCER_H_

#include "xla_ffi/batch_copies.h"
#include "xla_ffi/checks.h"

namespace lplb {

struct RebalanceCall {
  int64_t batch;
  Problem problem;
  Sources sources;  // of the counts that the call makes
  Tokens tokens;
  SolveOperands in;  // `loads` is null: the call counts them
  SolveResults out;
  ChosenCopies copies;

  explicit RebalanceCall(Frame& frame) {
    ProblemSizes sizes(frame);
    sizes.ReadNodes(frame);
    const bool positions = frame.Flag("positions");
    copies.ReadFanOut(frame, 0);
    tokens.ReadIndices(frame);
    batch = frame.batch();
    in.loads = nullptr;
    ReadPlacement(frame, sizes, in);
    problem = ProblemOf(frame, sizes);
    sources = {1, problem.n_logical + 1};
    tokens.ReadSlots(frame, positions, sizes);
    ReadSplit(frame, problem, sizes, ffi::DataType::S32, ffi::DataType::S32, out);
    if (copies.fan_out > 0) {
      if (problem.n_columns > 0) frame.Fail("fan_out: expected 0 along a topology");
      copies.ReadTables(frame, problem, sizes);
    }
    tokens.ReadWorkspace(frame);
  }
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_BALANCER_H_
