// ipm: its call, for both platforms.
#ifndef LPLB_XLA_FFI_IPM_H_
#define LPLB_XLA_FFI_IPM_H_

#include "cuda/ipm/arithmetic.h"
#include "xla_ffi/checks.h"

namespace lplb {

constexpr int32_t kMostIpmRanks = 46340;  // The square, the matrix's size, must be an int32.

struct IpmCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  IpmOptions options;
  IpmOperands in;
  SolveResults out;

  explicit IpmCall(Frame& frame) {
    ProblemSizes sizes(frame);
    options.weighted = frame.Flag("weighted");
    options.repair = frame.Flag("repair");
    options.cusolverdx = frame.Flag("cusolverdx");
    SourceSizes source_sizes;
    const ffi::DataType type =
        frame.Operand("loads", {ffi::DataType::S32, ffi::DataType::F32},
                      {&source_sizes.n_sources, &source_sizes.row}, &in.solve.loads);
    options.floats = type == ffi::DataType::F32;
    batch = frame.batch();
    ReadPlacement(frame, sizes, in.solve);
    frame.Operand("rank_weights", {&sizes.group_size}, &in.weights);
    if (sizes.group_size.value > kMostIpmRanks) {
      frame.Fail("r2o: the interior point takes groups of at most " +
                 std::to_string(kMostIpmRanks) + " ranks, got " +
                 std::to_string(sizes.group_size.value));
    }
    problem = ProblemOf(frame, sizes);
    sources = SourcesOf(frame, source_sizes, problem);
    ReadSplit(frame, problem, sizes, type,
              options.float_loads_out() ? ffi::DataType::F32 : ffi::DataType::S32, out);
  }
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_IPM_H_
