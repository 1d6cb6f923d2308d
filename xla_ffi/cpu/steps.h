// The steps on the CPU, one batch element at a time; Index is int32_t, int64_t, uint8_t or
// uint16_t.
#ifndef LPLB_XLA_FFI_CPU_STEPS_H_
#define LPLB_XLA_FFI_CPU_STEPS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/problem.h"
#include "xla_ffi/checks.h"

namespace lplb {

// counts [n_logical + 1]: tokens per expert, and invalid ids.
template <typename Index>
void Count(const Index* indices, int64_t n_tokens, int32_t n_logical, int32_t* counts);

// Without a topology, `start` [n_physical] are the quotas of a feasible split to start from; null:
// equal shares.
void Solve(const Problem& problem, const Sources& sources, const SolveOperands& in,
           const SolveResults& out, const Costs& costs = Costs(), const int32_t* start = nullptr);

// Chooses copies for these loads; `width` are an expert's places in out.log2phy. Returns the quotas
// with which they were found, [n_physical].
std::vector<int32_t> PlaceCopies(const Problem& problem, const Sources& sources,
                                 const SolveOperands& in, int32_t fan_out, int32_t width,
                                 const CopiesResults& out);

// An error unless every column of r2o is a permutation of the group's ranks: the solvers index with
// it and its inverse.
inline ffi::Error CheckTopology(const Problem& p, int64_t batch, const int32_t* r2o) {
  std::vector<int64_t> seen(p.group_size, -1);
  int64_t column = 0;
  for (int64_t b = 0; b < batch; ++b, r2o += p.group_size * p.n_columns) {
    for (int32_t d = 0; d < p.n_columns; ++d, ++column) {
      for (int32_t v = 0; v < p.group_size; ++v) {
        const int32_t source = r2o[v * p.n_columns + d];
        if (source >= 0 && source < p.group_size && seen[source] != column) {
          seen[source] = column;
          continue;
        }
        return Invalid("r2o: expected a permutation of 0 to " + std::to_string(p.group_size - 1) +
                       " in every column, got " + std::to_string(source) + " in row " +
                       std::to_string(v) + " of column " + std::to_string(d));
      }
    }
  }
  return ffi::Error::Success();
}

struct AssignResults {
  int32_t* physical;     // [n_tokens]
  int32_t* position;     // [n_tokens], or null
  int32_t* slot_counts;  // [n_physical], or null
};

// Where element `b` of a batch puts its slots.
inline AssignResults ResultsOf(const Tokens& tokens, const Problem& problem, int64_t b) {
  AssignResults out = {tokens.physical + b * tokens.n, nullptr, nullptr};
  if (tokens.position != nullptr) out.position = tokens.position + b * tokens.n;
  if (tokens.slot_counts != nullptr) out.slot_counts = tokens.slot_counts + b * problem.n_physical;
  return out;
}

template <typename Index>
void Assign(const Problem& problem, const Sources& sources, const AssignOperands& in,
            bool proportional, const Index* indices, int64_t n_tokens, const AssignResults& out);

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_STEPS_H_
