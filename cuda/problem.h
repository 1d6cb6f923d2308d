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
  kSyncFailed = 32,
};

// Division by a number known on the host, exact where (dividend + 1) · divisor ≤ 2³². Rounding the
// inverse down takes less from a product than the 1 that is added to the dividend gives. A divisor
// of 1 needs no branch, around which the compiler would duplicate loops.
struct Divisor {
  int32_t divisor;
  uint32_t inverse;  // ⌊(2³² − 1) / divisor⌋

  Divisor() = default;
  explicit Divisor(int32_t d) : divisor(d > 1 ? d : 1), inverse(~uint32_t{0} / divisor) {}

  LPLB_HOST_DEVICE int32_t Quotient(int32_t dividend) const {
    return static_cast<int32_t>((uint64_t{static_cast<uint32_t>(dividend) + 1} * inverse) >> 32);
  }
  LPLB_HOST_DEVICE int32_t Remainder(int32_t dividend) const {
    return dividend - Quotient(dividend) * divisor;
  }
};

// Division of any number of tokens ≥ 0 by a number known on the host. The inverse exceeds
// 2^(31 + shift) / divisor by 1 at most, and 2^shift is at least the divisor, so the quotient is
// exact. It is an instruction more than Divisor's.
struct TokenDivisor {
  int32_t divisor;
  uint32_t inverse;  // ⌊2^(31 + shift) / divisor⌋ + 1
  int32_t shift;     // ⌈log₂ divisor⌉

  TokenDivisor() = default;
  explicit TokenDivisor(int32_t d) : divisor(d > 1 ? d : 1), shift(0) {
    while (int64_t{1} << shift < divisor) ++shift;
    inverse = static_cast<uint32_t>((uint64_t{1} << (31 + shift)) / divisor + 1);
  }

  LPLB_HOST_DEVICE int32_t Quotient(int32_t dividend) const {
    const uint64_t product = uint64_t{2 * static_cast<uint32_t>(dividend)} * inverse;
    return static_cast<int32_t>(static_cast<uint32_t>(product >> 32) >> shift);
  }
  LPLB_HOST_DEVICE int32_t Remainder(int32_t dividend) const {
    return dividend - Quotient(dividend) * divisor;
  }
};

// Slots are numbered rank by rank. Along a topology, on each rank the n_local own experts come
// first, and redundant slot k of rank v copies local expert k of rank r2o[v, k % n_columns] of v's
// group. Any other placement has no columns and one group of all ranks; it is in phy2log, and of
// log2phy only the homes count.
struct Problem {
  int32_t ep_size;
  int32_t group_size;
  int32_t n_columns;
  int32_t n_logical;
  int32_t n_physical;
  int32_t max_replicas;
  // Ranks of a node, within which tokens of any placement stay if they can. 0 along a topology,
  // where the order of the sources does not depend on nodes.
  int32_t node_size;

  // Derived, since a division is a good part of a kernel of three microseconds.
  int32_t n_groups;
  int32_t n_local;         // experts of a rank
  int32_t slots_per_rank;  // n_local + n_redundant
  int32_t n_redundant;     // copies on a rank, and replicated experts of a rank
  int32_t tile_log2;       // log₂ of the threads that share a rank's experts: a power of two ≤ 32
  int32_t safe_load;       // slots_per_rank loads up to this sum below 2³¹
  Divisor by_columns;
  Divisor by_fixed;  // n_local − n_redundant
  Divisor by_group;
  Divisor by_redundant;
  Divisor by_slots;
  TokenDivisor by_ranks;

  Problem() = default;
  // Where there is no r2o, group_size and n_columns are 0.
  Problem(int32_t ep_size_, int32_t group_size_, int32_t n_columns_, int32_t n_logical_,
          int32_t n_physical_, int32_t max_replicas_)
      : ep_size(ep_size_),
        group_size(group_size_),
        n_columns(n_columns_),
        n_logical(n_logical_),
        n_physical(n_physical_),
        max_replicas(max_replicas_),
        node_size(0),
        n_groups(group_size_ > 0 ? ep_size_ / group_size_ : 0),
        n_local(n_logical_ / ep_size_),
        slots_per_rank(n_physical_ / ep_size_),
        n_redundant(slots_per_rank - n_local),
        tile_log2(0),
        safe_load(kInt32Max / (slots_per_rank > 0 ? slots_per_rank : 1)),
        by_columns(n_columns_),
        by_fixed(n_local - n_redundant),
        by_group(group_size_),
        by_redundant(n_redundant),
        by_slots(slots_per_rank),
        by_ranks(ep_size_) {
    while (tile_log2 < 5 && 1 << tile_log2 < n_local) ++tile_log2;
  }
};

// The buffers of one solve; with a batch, those of its first element.
struct SolveOperands {
  const int32_t* loads;    // [n_sources, row]
  const int32_t* phy2log;  // [n_physical]
  const int32_t* log2phy;  // [n_logical, max_replicas]
  const int32_t* r2o;      // [group_size, n_columns]
};

// What a solve counts besides tokens one by one.
struct Costs {
  TokenDivisor by_tile = TokenDivisor(1);  // rows: a slot costs ⌈quota / rows⌉ tiles
  const int32_t* base_load = nullptr;      // [ep_size], tiles that ranks have anyway; null: none
  int32_t* max_tokens = nullptr;  // [n_groups], what the largest loads are in tokens; or null

  LPLB_HOST_DEVICE int32_t TileRows() const { return by_tile.divisor; }
  LPLB_HOST_DEVICE int32_t TilesOf(int32_t tokens) const {
    const int32_t full = by_tile.Quotient(tokens);
    return full + (tokens > full * by_tile.divisor);
  }
  // Of the tiles that so many tokens fill.
  LPLB_HOST_DEVICE int32_t EmptyPlaces(int32_t tokens) const {
    const int32_t last = by_tile.Remainder(tokens);
    return last > 0 ? by_tile.divisor - last : 0;
  }
};

struct SolveResults {
  int32_t* quota;        // [n_physical]
  int32_t* max_load;     // [n_groups]
  int32_t* lower_bound;  // [n_groups]
  int32_t* status;       // [n_groups]
};

// The tables of the placement that place_copies makes; with a batch, those of its first element.
struct CopiesResults {
  int32_t* phy2log;           // [n_physical]
  int32_t* log2phy;           // [n_logical, width]
  int32_t* logcnt;            // [n_logical]
  int32_t* tokens = nullptr;  // [n_physical], the split that was found with them; null: not wanted
};

// The buffers of one assign besides the tokens.
struct AssignOperands {
  const int32_t* counts;   // [n_sources, row]
  const int32_t* quota;    // [n_physical]
  const int32_t* phy2log;  // [n_physical]
  const int32_t* log2phy;  // [n_logical, max_replicas]
  const int32_t* rank;     // []
};

// Counts per expert of n_sources source ranks, one row each; where row is n_logical + 1, the last
// place counts ids that name no expert.
struct Sources {
  int32_t n_sources;
  int32_t row;
};

// The buffers of element `b` of a batch. Where b is an int32, the products are of 32 bits each.
LPLB_HOST_DEVICE SolveOperands BatchElement(const Problem& p, const Sources& sources,
                                            const SolveOperands& first, int64_t b) {
  return {first.loads + b * (sources.n_sources * sources.row), first.phy2log + b * p.n_physical,
          first.log2phy + b * (p.n_logical * p.max_replicas),
          first.r2o + b * (p.group_size * p.n_columns)};
}

LPLB_HOST_DEVICE SolveResults BatchElement(const Problem& p, const SolveResults& first, int64_t b) {
  return {first.quota + b * p.n_physical, first.max_load + b * p.n_groups,
          first.lower_bound + b * p.n_groups, first.status + b * p.n_groups};
}

LPLB_HOST_DEVICE Costs BatchElement(const Problem& p, const Costs& first, int64_t b) {
  return {first.by_tile, first.base_load + b * p.ep_size, first.max_tokens + b * p.n_groups};
}

LPLB_HOST_DEVICE AssignOperands BatchElement(const Problem& p, const Sources& sources,
                                             const AssignOperands& first, int64_t b) {
  return {first.counts + b * (sources.n_sources * sources.row), first.quota + b * p.n_physical,
          first.phy2log + b * p.n_physical, first.log2phy + b * (p.n_logical * p.max_replicas),
          first.rank + b};
}

// A token's id, or that there is no token.
template <typename Index>
class IdOf {
 public:
  IdOf() = default;
  LPLB_HOST_DEVICE explicit IdOf(Index id) : number_(static_cast<Unsigned>(id)) {}

  static LPLB_HOST_DEVICE IdOf None() {
    IdOf none;
    none.number_ = ~Number{0};
    return none;
  }

  // The expert that the id names; `none` where the token chose none, or where there is no token;
  // n_logical where the id is invalid.
  LPLB_HOST_DEVICE int32_t Expert(int32_t n_logical, int32_t none) const {
    if (number_ < static_cast<Number>(n_logical)) return static_cast<int32_t>(number_);
    return number_ >= kAbsent ? none : n_logical;
  }

 private:
  using Unsigned = std::make_unsigned_t<Index>;
  // A GPU needs two instructions for 64 bits, and a CPU one more to address memory by 32.
#ifdef __CUDA_ARCH__
  using Number = std::conditional_t<sizeof(Index) <= sizeof(uint32_t), uint32_t, uint64_t>;
#else
  using Number = uint64_t;
#endif

  // What tokens have that chose none: −1, or the largest value of an unsigned type.
  static constexpr Number kAbsent = static_cast<Unsigned>(-1);

  Number number_;
};

// The expert an id names; −1 where the token chose none; n_logical where the id is invalid.
template <typename Index>
LPLB_HOST_DEVICE int32_t ExpertOf(Index id, int32_t n_logical) {
  return IdOf<Index>(id).Expert(n_logical, -1);
}

// Targets for which place_copies attempts to find copies; and what fewer copies may cost: the mean
// rank load, shifted so far.
constexpr int32_t kNTargets = 32;
constexpr int32_t kCopiesWorth = 9;

// ⌊of · i² / 2¹⁰⌋, which fits: i is at most kNTargets. See lplb_jax/reference/batch_copies.py.
LPLB_HOST_DEVICE int32_t CopyTargetPart(int32_t of, int32_t i) {
  return (of >> 10) * i * i + ((of & 1023) * i * i >> 10);
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
// slot `replica`; −1 where log2phy names no slot, or one that holds another expert.
struct Route {
  int32_t keep;
  int32_t home;
  int32_t replica;
};

// The slots of an expert; keep is what it is where no quota changes it.
LPLB_HOST_DEVICE Route SlotsOf(const Problem& p, const int32_t* phy2log, const int32_t* log2phy,
                               int32_t expert) {
  const auto own = [&](int32_t slot) {
    return slot >= 0 && slot < p.n_physical && phy2log[slot] == expert ? slot : -1;
  };
  const int32_t* slots = log2phy + expert * p.max_replicas;
  return {kInt32Max, own(slots[0]), own(slots[1])};
}

// keep of an expert's route on source rank `rank`.
LPLB_HOST_DEVICE int32_t KeepOf(const Problem& p, const Sources& sources, const int32_t* counts,
                                const int32_t* quota, int32_t rank, bool proportional,
                                int32_t expert, const Route& route) {
  if (route.home < 0 || route.replica < 0) return kInt32Max;
  // The solvers' quotas are never negative, nor is a sum of two above int32; others may be.
  const int32_t stay = quota[route.home] > 0 ? quota[route.home] : 0;
  if (proportional) {
    const int32_t count = counts[expert] > 0 ? counts[expert] : 0;
    const int32_t away = quota[route.replica] > 0 ? quota[route.replica] : 0;
    const int32_t load = away < kInt32Max - stay ? stay + away : kInt32Max;
    return ProportionalShare(count, stay, load, rank, p.ep_size);
  }
  int64_t keep = stay;
  if (sources.n_sources > 1) {
    const int32_t home_rank = p.by_slots.Quotient(route.home);
    const int32_t replica_rank = p.by_slots.Quotient(route.replica);
    for (int32_t s = 0; s < sources.n_sources; ++s) {
      const int32_t count = counts[s * sources.row + expert];
      if (count > 0 && ComesBefore(s, rank, home_rank, replica_rank)) keep -= count;
    }
  }
  return static_cast<int32_t>(keep > 0 ? keep : 0);
}

}  // namespace lplb

#endif  // LPLB_CUDA_PROBLEM_H_
