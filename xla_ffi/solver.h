// solve: its call, for both platforms.
#ifndef LPLB_XLA_FFI_SOLVER_H_
#define LPLB_XLA_FFI_SOLVER_H_

#include "xla_ffi/checks.h"

namespace lplb {

struct SolveCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  SolveOperands in;
  SolveResults out;

  explicit SolveCall(Frame& frame) {
    ProblemSizes sizes(frame);
    SourceSizes source_sizes;
    frame.Operand("loads", {&source_sizes.n_sources, &source_sizes.row}, &in.loads);
    batch = frame.batch();
    ReadPlacement(frame, sizes, in);
    problem = ProblemOf(frame, sizes);
    sources = SourcesOf(frame, source_sizes, problem);
    ReadSplit(frame, problem, sizes, ffi::DataType::S32, ffi::DataType::S32, out);
  }
};

// solve where slots cost tiles and ranks have a base load.
constexpr int64_t kMostRows = 1 << 20;  // of a tile

inline TokenDivisor ReadTile(Frame& frame) {
  return TokenDivisor(static_cast<int32_t>(frame.Attribute("tile", 1, kMostRows)));
}

struct SolveCostsCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  SolveOperands in;
  Costs costs;
  SolveResults out;

  explicit SolveCostsCall(Frame& frame) {
    ProblemSizes sizes(frame);
    costs.by_tile = ReadTile(frame);
    SourceSizes source_sizes;
    frame.Operand("loads", {&source_sizes.n_sources, &source_sizes.row}, &in.loads);
    batch = frame.batch();
    ReadPlacement(frame, sizes, in);
    frame.Operand("base_load", {&sizes.ep_size}, &costs.base_load);
    problem = ProblemOf(frame, sizes);
    sources = SourcesOf(frame, source_sizes, problem);
    ReadSplit(frame, problem, sizes, ffi::DataType::S32, ffi::DataType::S32, out);
    Size n_groups = {"n_groups", problem.n_groups};
    frame.Result("max_tokens", {&n_groups}, &costs.max_tokens);
  }
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_SOLVER_H_
