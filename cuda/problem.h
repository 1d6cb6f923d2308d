// Sizes of a balancing problem and the arithmetic that CPU and GPU share. No XLA, no Python.
#ifndef LPLB_CUDA_PROBLEM_H_
#define LPLB_CUDA_PROBLEM_H_

#include <cstdint>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define LPLB_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LPLB_HOST_DEVICE inline
#endif

namespace lplb {

constexpr int32_t kInt32Max = std::numeric_limits<int32_t>::max();

// Bits of Split.status; lplb_jax/status.py documents them.
enum Status : int32_t {
  kInvalidIndex = 1,
  kNegativeLoad = 2,
  kLoadOverflow = 4,
  kBadPlacement = 8,
  kNotConverged = 16,
};

// Slots are numbered rank by rank; on each rank the n_local own experts come first. Redundant slot
// k of rank v copies local expert k of rank r2o[v, k % n_columns] of v's group.
struct Problem {
  int32_t ep_size;
  int32_t group_size;
  int32_t n_columns;
  int32_t n_logical;
  int32_t n_physical;
  int32_t max_replicas;

  LPLB_HOST_DEVICE int32_t n_groups() const { return ep_size / group_size; }
  LPLB_HOST_DEVICE int32_t n_local() const { return n_logical / ep_size; }
  LPLB_HOST_DEVICE int32_t slots_per_rank() const { return n_physical / ep_size; }
  LPLB_HOST_DEVICE int32_t n_redundant() const { return slots_per_rank() - n_local(); }
};

// The buffers of one solve; with a batch, those of its first element.
struct SolveOperands {
  const int32_t* loads;    // [n_sources, row]
  const int32_t* phy2log;  // [n_physical]
  const int32_t* log2phy;  // [n_logical, max_replicas]
  const int32_t* r2o;      // [group_size, n_columns]
};

struct SolveResults {
  int32_t* quota;        // [n_physical]
  int32_t* max_load;     // [n_groups]
  int32_t* lower_bound;  // [n_groups]
  int32_t* status;       // [n_groups]
};

// The buffers of one assign besides the tokens.
struct AssignOperands {
  const int32_t* counts;   // [n_sources, row]
  const int32_t* quota;    // [n_physical]
  const int32_t* log2phy;  // [n_logical, max_replicas]
  const int32_t* rank;     // []
};

// Counts per expert of n_sources source ranks, one row each; where row is n_logical + 1, the last
// place counts ids that name no expert.
struct Sources {
  int32_t n_sources;
  int32_t row;
};

// The buffers of element `b` of a batch.
LPLB_HOST_DEVICE SolveOperands BatchElement(const Problem& p, const Sources& sources,
                                            const SolveOperands& first, int64_t b) {
  return {first.loads + b * sources.n_sources * sources.row, first.phy2log + b * p.n_physical,
          first.log2phy + b * p.n_logical * p.max_replicas,
          first.r2o + b * p.group_size * p.n_columns};
}

LPLB_HOST_DEVICE SolveResults BatchElement(const Problem& p, const SolveResults& first, int64_t b) {
  return {first.quota + b * p.n_physical, first.max_load + b * p.n_groups(),
          first.lower_bound + b * p.n_groups(), first.status + b * p.n_groups()};
}

LPLB_HOST_DEVICE AssignOperands BatchElement(const Problem& p, const Sources& sources,
                                             const AssignOperands& first, int64_t b) {
  return {first.counts + b * sources.n_sources * sources.row, first.quota + b * p.n_physical,
          first.log2phy + b * p.n_logical * p.max_replicas, first.rank + b};
}

// The expert an id names; −1 where the token chose none; n_logical where the id is invalid.
template <typename Index>
LPLB_HOST_DEVICE int32_t ExpertOf(Index id, int32_t n_logical) {
  using Unsigned = std::make_unsigned_t<Index>;
  constexpr Index kAbsent = static_cast<Index>(-1);  // The largest value of an unsigned type.
  if (static_cast<uint64_t>(static_cast<Unsigned>(id)) < static_cast<uint64_t>(n_logical)) {
    return static_cast<int32_t>(id);
  }
  return id == kAbsent ? -1 : n_logical;
}

// ⌊(count · stay + offset) / load⌋ with the rounding offset spread over the source ranks; see
// proportional_share in lplb_jax/reference/assignment.py.
LPLB_HOST_DEVICE int32_t ProportionalShare(int32_t count, int32_t stay, int32_t load, int32_t rank,
                                           int32_t ep_size) {
  if (load <= 0) return count;
  const uint64_t divisor = static_cast<uint64_t>(load);
  const uint64_t odd = 2 * static_cast<uint64_t>(rank) + 1;
  const uint64_t offset = divisor * odd / (2 * static_cast<uint64_t>(ep_size));
  const uint64_t product = static_cast<uint64_t>(count) * static_cast<uint64_t>(stay);
  return static_cast<int32_t>((product + offset) / divisor);
}

// Whether source rank `source` comes before `rank` in the order in which an expert's tokens are
// taken: its home rank first (also where it holds the replica), the replica's rank last.
LPLB_HOST_DEVICE bool ComesBefore(int32_t source, int32_t rank, int32_t home, int32_t replica) {
  if (source == rank || rank == home) return false;
  if (source == home) return true;
  if (source == replica) return false;
  return rank == replica || source < rank;
}

// Where the tokens of one expert on one source go: the first `keep` to slot `home`, the rest to
// slot `replica`; −1 where log2phy names no slot.
struct Route {
  int32_t keep;
  int32_t home;
  int32_t replica;
};

LPLB_HOST_DEVICE Route RouteOf(const Problem& p, const Sources& sources, const AssignOperands& in,
                               int32_t rank, bool proportional, int32_t expert) {
  const int32_t home = in.log2phy[expert * p.max_replicas];
  const int32_t replica = in.log2phy[expert * p.max_replicas + 1];
  const bool has_home = home >= 0 && home < p.n_physical;
  const bool has_replica = replica >= 0 && replica < p.n_physical;
  Route route = {kInt32Max, has_home ? home : -1, has_replica ? replica : -1};
  if (!has_home || !has_replica) return route;
  const int32_t stay = in.quota[home];
  if (proportional) {
    const int32_t count = in.counts[expert] > 0 ? in.counts[expert] : 0;
    route.keep = ProportionalShare(count, stay, stay + in.quota[replica], rank, p.ep_size);
    return route;
  }
  int64_t keep = stay;
  if (sources.n_sources > 1) {
    const int32_t slots = p.slots_per_rank();
    for (int32_t s = 0; s < sources.n_sources; ++s) {
      const int32_t count = in.counts[static_cast<int64_t>(s) * sources.row + expert];
      if (count > 0 && ComesBefore(s, rank, home / slots, replica / slots)) keep -= count;
    }
  }
  route.keep = static_cast<int32_t>(keep > 0 ? keep : 0);
  return route;
}

}  // namespace lplb

#endif  // LPLB_CUDA_PROBLEM_H_
