// place_copies: its call, for both platforms, and what it shares with other calls that choose
// copies.
#ifndef LPLB_XLA_FFI_BATCH_COPIES_H_
#define LPLB_XLA_FFI_BATCH_COPIES_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "xla_ffi/checks.h"

namespace lplb {

// Copies that a call chooses for its loads; none if fan_out is 0.
struct ChosenCopies {
  int32_t fan_out = 0;  // copies of its experts that a rank may send
  int32_t width = 0;    // places per expert in log2phy
  CopiesResults out = {};

  void ReadFanOut(Frame& frame, int64_t least) {
    fan_out = static_cast<int32_t>(frame.Attribute("fan_out", least, Size::kMost));
  }

  void ReadTables(Frame& frame, const Problem& problem, ProblemSizes& sizes) {
    width = 1 + std::min({problem.ep_size - 1, problem.n_physical - problem.n_logical, fan_out});
    if (int64_t{problem.n_logical} * width > Size::kMost) {
      frame.Fail("log2phy: expected at most " + std::to_string(Size::kMost) + " places, got " +
                 std::to_string(problem.n_logical) + " x " + std::to_string(width) +
                 "; pass a smaller fan_out");
    }
    Size places = {"width", width};
    frame.Result("phy2log", {&sizes.n_physical}, &out.phy2log);
    frame.Result("log2phy", {&sizes.n_logical, &places}, &out.log2phy);
    frame.Result("logcnt", {&sizes.n_logical}, &out.logcnt);
  }

  // The tables of one batch element.
  CopiesResults Of(const Problem& p, int64_t element) const {
    return {out.phy2log + element * p.n_physical, out.log2phy + element * (p.n_logical * width),
            out.logcnt + element * p.n_logical};
  }
};

struct CopiesCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  SolveOperands in;  // without r2o
  ChosenCopies copies;

  explicit CopiesCall(Frame& frame) {
    ProblemSizes sizes(frame);
    SourceSizes source_sizes;
    copies.ReadFanOut(frame, 1);
    frame.Operand("loads", {&source_sizes.n_sources, &source_sizes.row}, &in.loads);
    batch = frame.batch();
    frame.Operand("placement.phy2log", {&sizes.n_physical}, &in.phy2log);
    frame.Operand("placement.log2phy", {&sizes.n_logical, &sizes.max_replicas}, &in.log2phy);
    in.r2o = nullptr;
    problem = ProblemOf(frame, sizes);
    sources = SourcesOf(frame, source_sizes, problem);
    copies.ReadTables(frame, problem, sizes);
  }
};

// solve over copies chosen for its loads. Its results are the split, then the tables.
struct SolveCopiesCall {
  int64_t batch;
  Problem problem;
  Sources sources;
  SolveOperands in;
  SolveResults split;
  ChosenCopies copies;

  explicit SolveCopiesCall(Frame& frame) {
    ProblemSizes sizes(frame);
    SourceSizes source_sizes;
    copies.ReadFanOut(frame, 1);
    frame.Operand("loads", {&source_sizes.n_sources, &source_sizes.row}, &in.loads);
    batch = frame.batch();
    ReadPlacement(frame, sizes, in);
    problem = ProblemOf(frame, sizes);
    sources = SourcesOf(frame, source_sizes, problem);
    ReadSplit(frame, problem, sizes, ffi::DataType::S32, ffi::DataType::S32, split);
    copies.ReadTables(frame, problem, sizes);
    if (problem.n_columns > 0) frame.Fail("r2o: expected no columns where copies are chosen");
  }

  // The problem of the placement that is chosen.
  Problem Chosen() const {
    Problem chosen = problem;
    chosen.max_replicas = copies.width;
    return chosen;
  }
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_BATCH_COPIES_H_
