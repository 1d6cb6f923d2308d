// Any placement as a graph: experts with several hosts connect ranks. No XLA, no Python.
#ifndef LPLB_XLA_FFI_CPU_GRAPH_H_
#define LPLB_XLA_FFI_CPU_GRAPH_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lplb {

// The cells of a placement. A cell is an expert on a rank that hosts it. If a rank hosts an expert
// twice, the first slot serves all its tokens and is the cell's. Cells are numbered expert by
// expert, and within an expert by rank.
struct ReplicaGraph {
  // phy2log [n_ranks · slots_per_rank]: the expert in each slot, −1 in an empty one.
  ReplicaGraph(int32_t n_ranks_, int32_t n_logical_, int32_t slots_per_rank, const int32_t* phy2log)
      : n_ranks(n_ranks_),
        n_logical(n_logical_),
        known(true),
        first(n_logical_ + 1),
        first_shared(n_ranks_ + 1) {
    constexpr int32_t kNoCell = -1;
    const int32_t n_physical = n_ranks * slots_per_rank;
    std::vector<int32_t> nth(n_physical, kNoCell);  // A slot's index among its expert's cells.
    std::vector<int32_t> last_host(n_logical, -1);
    for (int32_t r = 0, p = 0; r < n_ranks; ++r) {
      for (int32_t k = 0; k < slots_per_rank; ++k, ++p) {
        const int32_t e = phy2log[p];
        if (e < 0 || e >= n_logical) {
          known &= e == -1;
        } else if (last_host[e] != r) {
          last_host[e] = r;
          nth[p] = first[e + 1]++;
        }
      }
    }
    for (int32_t e = 0; e < n_logical; ++e) first[e + 1] += first[e];
    rank.resize(first[n_logical]);
    slot.resize(first[n_logical]);
    shared.reserve(first[n_logical]);
    for (int32_t r = 0, p = 0; r < n_ranks; ++r) {
      for (int32_t k = 0; k < slots_per_rank; ++k, ++p) {
        if (nth[p] == kNoCell) continue;
        const int32_t e = phy2log[p];
        const int32_t cell = first[e] + nth[p];
        rank[cell] = r;
        slot[cell] = p;
        if (Hosts(e) > 1) shared.push_back({e, cell});
      }
      first_shared[r + 1] = static_cast<int32_t>(shared.size());
    }
  }

  int32_t Hosts(int32_t expert) const { return first[expert + 1] - first[expert]; }

  // The slot that serves an expert unless quotas say otherwise. It is `home`, the first slot in
  // log2phy, if that is a cell of the expert; otherwise the expert's first cell, or −1 if there is
  // none.
  int32_t HomeOf(int32_t expert, int32_t home) const {
    if (IsCell(expert, home)) return home;
    return Hosts(expert) > 0 ? slot[first[expert]] : -1;
  }

  bool IsCell(int32_t expert, int32_t of_slot) const {
    const auto begin = slot.begin();
    return std::find(begin + first[expert], begin + first[expert + 1], of_slot) !=
           begin + first[expert + 1];
  }

  // Whether no slot holds an unknown id, and log2phy [n_logical, max_replicas] names one of its
  // cells first for every expert.
  bool Agrees(const int32_t* log2phy, int32_t max_replicas) const {
    bool agrees = known;
    for (int32_t e = 0; e < n_logical; ++e) agrees &= IsCell(e, log2phy[e * max_replicas]);
    return agrees;
  }

  // The quotas if loads are too large to be divided: everything stays at home.
  template <typename Load>
  void WriteHomeQuotas(const int32_t* log2phy, int32_t max_replicas, const Load* loads,
                       int32_t n_physical, Load* quota) const {
    std::fill_n(quota, n_physical, Load{0});
    for (int32_t e = 0; e < n_logical; ++e) {
      const int32_t home = HomeOf(e, log2phy[e * max_replicas]);
      if (home >= 0) quota[home] = loads[e];
    }
  }

  struct Shared {
    int32_t expert;
    int32_t cell;
  };

  int32_t n_ranks;
  int32_t n_logical;
  bool known;                         // No slot holds an id that names no expert.
  std::vector<int32_t> first;         // [n_logical + 1], the first cell of each expert
  std::vector<int32_t> rank;          // [n_cells]
  std::vector<int32_t> slot;          // [n_cells]
  std::vector<Shared> shared;         // Cells of experts with several hosts, in slot order.
  std::vector<int32_t> first_shared;  // [n_ranks + 1], the first entry of each rank in `shared`
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_GRAPH_H_
