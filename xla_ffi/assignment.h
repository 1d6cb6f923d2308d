// assign: its call, for both platforms.
#ifndef LPLB_XLA_FFI_ASSIGNMENT_H_
#define LPLB_XLA_FFI_ASSIGNMENT_H_

#include "xla_ffi/checks.h"

namespace lplb {

struct AssignCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  bool proportional;
  Tokens tokens;
  AssignOperands in;

  explicit AssignCall(Frame& frame) {
    ProblemSizes sizes(frame);
    sizes.ReadNodes(frame);
    proportional = frame.Flag("proportional");
    const bool positions = frame.Flag("positions");
    SourceSizes source_sizes;
    tokens.ReadIndices(frame);
    batch = frame.batch();
    frame.Operand("loads", {&source_sizes.n_sources, &source_sizes.row}, &in.counts);
    frame.Operand("split.quota", {&sizes.n_physical}, &in.quota);
    frame.Operand("placement.phy2log", {&sizes.n_physical}, &in.phy2log);
    frame.Operand("placement.log2phy", {&sizes.n_logical, &sizes.max_replicas}, &in.log2phy);
    frame.Operand("rank", {}, &in.rank);
    problem = ProblemOf(frame, sizes);
    sources = SourcesOf(frame, source_sizes, problem);
    tokens.ReadSlots(frame, positions, sizes);
    tokens.ReadWorkspace(frame);
  }
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_ASSIGNMENT_H_
