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

}  // namespace lplb

#endif  // LPLB_XLA_FFI_SOLVER_H_
