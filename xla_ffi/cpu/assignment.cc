// assign: which slot serves each token of one source rank.
#include "xla_ffi/assignment.h"

#include <algorithm>
#include <string>
#include <vector>

#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/pieces.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {

template <typename Index>
void Assign(const Problem& problem, const Sources& sources, const AssignOperands& in,
            bool proportional, const Index* indices, int64_t n_tokens, const AssignResults& out) {
  const int32_t n_logical = problem.n_logical;
  const Pieces pieces = problem.node_size > 0
                            ? LocalPieces(problem, sources, in, proportional).Make()
                            : PiecesAlongTopology(problem, sources, in, proportional);
  // The piece that takes each expert's next token.
  struct Dealer {
    int32_t slot;
    int32_t position;
    int32_t left;
    int32_t piece;
  };
  std::vector<Dealer> dealers(n_logical);
  for (int32_t e = 0; e < n_logical; ++e) {
    const Piece& piece = *pieces.begin(e);
    dealers[e] = {piece.slot, 0, piece.end, 0};
  }
  for (int64_t i = 0; i < n_tokens; ++i) {
    const int32_t expert = ExpertOf(indices[i], n_logical);
    int32_t slot = -1;
    int32_t position = -1;
    if (expert >= 0 && expert < n_logical) {
      Dealer& dealer = dealers[expert];
      if (dealer.left == 0) {
        const Piece* ended = pieces.begin(expert) + dealer.piece;
        dealer = {ended[1].slot, 0, ended[1].end - ended[0].end, dealer.piece + 1};
      }
      --dealer.left;
      slot = dealer.slot;
      position = slot >= 0 ? dealer.position++ : -1;
    }
    out.physical[i] = slot;
    if (out.position != nullptr) out.position[i] = position;
  }
  if (out.slot_counts == nullptr) return;
  std::fill_n(out.slot_counts, problem.n_physical, 0);
  for (int32_t e = 0; e < n_logical; ++e) {
    const Piece* piece = pieces.begin(e);
    int32_t start = 0;
    for (int32_t k = 0; k < dealers[e].piece; ++k) {
      if (piece[k].slot >= 0) out.slot_counts[piece[k].slot] += piece[k].end - start;
      start = piece[k].end;
    }
    if (dealers[e].slot >= 0) out.slot_counts[dealers[e].slot] += dealers[e].position;
  }
}

template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const int32_t*,
                     int64_t, const AssignResults&);
template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const int64_t*,
                     int64_t, const AssignResults&);
template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const uint8_t*,
                     int64_t, const AssignResults&);
template void Assign(const Problem&, const Sources&, const AssignOperands&, bool, const uint16_t*,
                     int64_t, const AssignResults&);

namespace {

ffi::Error RunAssign(const AssignCall& call) {
  const Problem& p = call.problem;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int32_t rank = call.in.rank[b];
    if (rank < 0 || rank >= p.ep_size) {
      return Invalid("rank: expected 0 to " + std::to_string(p.ep_size - 1) + ", got " +
                     std::to_string(rank));
    }
  }
  return WithIndexType(call.tokens.type, [&](auto* type) {
    auto* indices = static_cast<decltype(type)>(call.tokens.indices);
    for (int64_t b = 0; b < call.batch; ++b) {
      Assign(p, call.sources, BatchElement(p, call.sources, call.in, b), call.proportional,
             indices + b * call.tokens.n, call.tokens.n, ResultsOf(call.tokens, p, b));
    }
    return ffi::Error::Success();
  });
}

const Register assign({"lplb_assign", CpuHandler<AssignCall, RunAssign>});

}  // namespace
}  // namespace lplb
