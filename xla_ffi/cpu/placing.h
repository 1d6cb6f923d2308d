// Placements for exact balancing, made from past loads: where experts have their homes, which of
// them get copies, and on which ranks. No XLA, no Python.
#ifndef LPLB_XLA_FFI_CPU_PLACING_H_
#define LPLB_XLA_FFI_CPU_PLACING_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace lplb {

// The sizes of a placement. A rank has slots for the experts that have their home there, and slots
// for copies. If experts do not divide evenly over ranks, some ranks have one more home.
struct PlaceSizes {
  int32_t n_ranks;
  int32_t n_logical;
  int32_t slots_per_rank;
  int32_t ranks_per_node;

  // Number of homes on rank r. Ranks are alike, so the first ones get one more if needed.
  int32_t homes(int32_t r) const { return n_logical / n_ranks + (r < n_logical % n_ranks); }
  int32_t copies() const { return n_ranks * slots_per_rank - n_logical; }
};

// A placement under construction for `loads` [n_logical].
class Placing {
 public:
  // `stay`: copies stay on their expert's node while there is room. `home_ranks` [n_logical], if
  // not null, fixes the homes.
  Placing(const PlaceSizes& sizes, const double* loads, const int32_t* home_ranks, bool stay)
      : sizes_(sizes),
        loads_(loads),
        home_ranks_(home_ranks),
        stay_(stay),
        ranks_(sizes.n_logical),
        of_rank_(sizes.n_ranks),
        homes_(sizes.n_ranks),
        copies_left_(sizes.n_ranks),
        load_(sizes.n_ranks) {
    for (int32_t r = 0; r < sizes.n_ranks && home_ranks == nullptr; ++r) homes_[r] = sizes.homes(r);
    for (int32_t e = 0; e < sizes.n_logical && home_ranks != nullptr; ++e) ++homes_[home_ranks[e]];
    homes_left_ = homes_;
    for (int32_t r = 0; r < sizes.n_ranks; ++r) copies_left_[r] = sizes.slots_per_rank - homes_[r];
  }

  // The number of copies of each expert, so that no expert's share of load exceeds `theta` of the
  // mean rank load, as far as slots suffice. With `all`, the remaining slots give experts a second
  // copy, then a third, heaviest first.
  std::vector<int32_t> Counts(double theta, bool all) const {
    std::vector<int32_t> counts(sizes_.n_logical, 1);
    int32_t left = sizes_.copies();
    const double limit =
        theta * std::accumulate(loads_, loads_ + sizes_.n_logical, 0.0) / sizes_.n_ranks;
    const auto share = [&](int32_t e) {
      return counts[e] < sizes_.n_ranks ? loads_[e] / counts[e] : -1.0;
    };
    for (; left > 0; --left) {
      int32_t heaviest = 0;
      for (int32_t e = 1; e < sizes_.n_logical; ++e) {
        if (share(e) > share(heaviest)) heaviest = e;
      }
      if (share(heaviest) <= limit) break;
      ++counts[heaviest];
    }
    if (!all) return counts;
    for (; left > 0; --left) {
      int32_t next = 0;
      for (int32_t e = 1; e < sizes_.n_logical; ++e) {
        if (counts[e] < counts[next] || (counts[e] == counts[next] && loads_[e] > loads_[next])) {
          next = e;
        }
      }
      if (counts[next] == sizes_.n_ranks) break;
      ++counts[next];
    }
    return counts;
  }

  // Puts the `counts` copies of each expert on different ranks. The heaviest shares come first,
  // each to the lightest rank with room. `meet` is the cost, in shares, of meeting an expert that
  // the same two ranks already share: it makes many pairs of ranks share something. Copies that
  // find no room are left out.
  void Pack(const std::vector<int32_t>& counts, double meet) {
    std::vector<int32_t> shared(sizes_.n_ranks * sizes_.n_ranks);
    std::vector<double> crowd(sizes_.n_ranks);
    for (const int32_t e : ByShare(counts)) {
      const double share = loads_[e] / counts[e];
      std::fill(crowd.begin(), crowd.end(), 0.0);
      const auto add = [&](bool home) {
        int32_t best = -1;
        const auto cost = [&](int32_t r) { return load_[r] + meet * share * crowd[r]; };
        for (int32_t r = 0; r < sizes_.n_ranks; ++r) {
          if ((home ? homes_left_ : copies_left_)[r] == 0 || Hosts(e, r)) continue;
          if (home && home_ranks_ != nullptr && home_ranks_[e] != r) continue;
          if (best < 0 || Order(e, r, cost(r)) < Order(e, best, cost(best))) best = r;
        }
        if (best < 0) return;
        Add(e, best);
        load_[best] += share;
        for (int32_t q = 0; q < sizes_.n_ranks; ++q) crowd[q] += shared[best * sizes_.n_ranks + q];
      };
      add(true);
      for (int32_t k = 1; k < counts[e]; ++k) add(false);
      for (const int32_t r : ranks_[e]) {
        for (const int32_t q : ranks_[e]) shared[r * sizes_.n_ranks + q] += r != q;
      }
    }
  }

  // Fills the remaining slots. The ranks in turn, heaviest first, lend an expert to the rank that
  // is farthest from its hosts in the graph of ranks that share experts.
  void Link() {
    SetDistances();
    std::vector<int32_t> lent(sizes_.n_ranks);
    int32_t left = std::accumulate(copies_left_.begin(), copies_left_.end(), 0);
    std::vector<bool> can_lend(sizes_.n_ranks, true);
    while (left > 0) {
      int32_t lender = -1;
      for (int32_t r = 0; r < sizes_.n_ranks; ++r) {
        if (!can_lend[r]) continue;
        if (lender < 0 || lent[r] < lent[lender] ||
            (lent[r] == lent[lender] && load_[r] > load_[lender])) {
          lender = r;
        }
      }
      if (lender < 0) return;  // Every expert is on every rank with room.
      if (Lend(lender)) {
        ++lent[lender];
        --left;
      } else {
        can_lend[lender] = false;
      }
    }
  }

  // Writes the expert in each slot: a rank's own experts, then its copies, both by falling load; −1
  // if empty. Also writes the home of every expert.
  void Write(int32_t* phy2log, int32_t* homes) {
    std::fill_n(phy2log, sizes_.n_ranks * sizes_.slots_per_rank, -1);
    std::vector<int32_t> order(sizes_.n_logical);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return loads_[a] > loads_[b]; });
    std::vector<int32_t> own(sizes_.n_ranks);
    std::vector<int32_t> copies = homes_;
    for (const int32_t e : order) {
      for (size_t k = 0; k < ranks_[e].size(); ++k) {
        const int32_t r = ranks_[e][k];
        const int32_t slot = r * sizes_.slots_per_rank + (k == 0 ? own[r]++ : copies[r]++);
        phy2log[slot] = e;
        if (k == 0) homes[e] = slot;
      }
    }
  }

 private:
  // Sorts by falling share, then by number of copies (more first), then by the expert's number.
  std::vector<int32_t> ByShare(const std::vector<int32_t>& counts) const {
    std::vector<int32_t> order(sizes_.n_logical);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const double share_a = loads_[a] / counts[a];
      const double share_b = loads_[b] / counts[b];
      return share_a != share_b ? share_a > share_b : counts[a] > counts[b];
    });
    return order;
  }

  bool Hosts(int32_t e, int32_t r) const {
    return std::find(ranks_[e].begin(), ranks_[e].end(), r) != ranks_[e].end();
  }

  // The key by which ranks are compared: ranks on a different node from the home come last.
  std::pair<bool, double> Order(int32_t e, int32_t r, double cost) const {
    return {stay_ && !ranks_[e].empty() &&
                r / sizes_.ranks_per_node != ranks_[e][0] / sizes_.ranks_per_node,
            cost};
  }

  // The first rank of an expert is its home.
  void Add(int32_t e, int32_t r) {
    --(ranks_[e].empty() ? homes_left_ : copies_left_)[r];
    ranks_[e].push_back(r);
    of_rank_[r].push_back(e);
  }

  double Share(int32_t e) const { return loads_[e] / ranks_[e].size(); }

  // Lends an expert of `lender`, with few copies and much load, to the farthest rank.
  bool Lend(int32_t lender) {
    std::vector<int32_t>& own = of_rank_[lender];
    std::stable_sort(own.begin(), own.end(), [&](int32_t a, int32_t b) {
      if (ranks_[a].size() != ranks_[b].size()) return ranks_[a].size() < ranks_[b].size();
      const double share_a = Share(a);
      const double share_b = Share(b);
      return share_a != share_b ? share_a > share_b : a < b;
    });
    for (const int32_t e : own) {
      const int32_t to = Farthest(e);
      if (to < 0) continue;
      const double old_share = Share(e);
      const std::vector<int32_t> hosts = ranks_[e];
      Add(e, to);
      for (const int32_t r : hosts) load_[r] += Share(e) - old_share;
      load_[to] += Share(e);
      for (const int32_t r : hosts) Connect(r, to);
      return true;
    }
    return false;
  }

  // Among the ranks with room, the farthest from the hosts of an expert; then the one with fewest
  // copies, then the lightest.
  int32_t Farthest(int32_t e) const {
    int32_t best = -1;
    int32_t best_distance = 0;
    for (int32_t r = 0; r < sizes_.n_ranks; ++r) {
      if (copies_left_[r] == 0 || Hosts(e, r)) continue;
      int32_t distance = std::numeric_limits<int32_t>::max();
      for (const int32_t q : ranks_[e]) {
        distance = std::min(distance, distance_[q * sizes_.n_ranks + r]);
      }
      const auto key = [&](int32_t rank, int32_t d) {
        return std::tuple(Order(e, rank, 0.0).first, -d, -copies_left_[rank], load_[rank]);
      };
      if (best < 0 || key(r, distance) < key(best, best_distance)) {
        best = r;
        best_distance = distance;
      }
    }
    return best;
  }

  // Sets the number of hops between ranks over shared experts, n_ranks if there is no path.
  void SetDistances() {
    const int32_t n = sizes_.n_ranks;
    distance_.assign(n * n, n);
    for (int32_t r = 0; r < n; ++r) distance_[r * n + r] = 0;
    for (const std::vector<int32_t>& hosts : ranks_) {
      for (const int32_t r : hosts) {
        for (const int32_t q : hosts) {
          if (r != q) distance_[r * n + q] = 1;
        }
      }
    }
    for (int32_t via = 0; via < n; ++via) {
      for (int32_t r = 0; r < n; ++r) {
        const int32_t to_via = distance_[r * n + via];
        if (to_via == n) continue;
        for (int32_t q = 0; q < n; ++q) {
          distance_[r * n + q] = std::min(distance_[r * n + q], to_via + distance_[via * n + q]);
        }
      }
    }
  }

  // Updates the distances once ranks a and b share an expert.
  void Connect(int32_t a, int32_t b) {
    const int32_t n = sizes_.n_ranks;
    if (distance_[a * n + b] <= 1) return;
    const std::vector<int32_t> from_a(&distance_[a * n], &distance_[a * n] + n);
    const std::vector<int32_t> from_b(&distance_[b * n], &distance_[b * n] + n);
    for (int32_t r = 0; r < n; ++r) {
      for (int32_t q = 0; q < n; ++q) {
        int32_t& d = distance_[r * n + q];
        d = std::min({d, from_a[r] + 1 + from_b[q], from_b[r] + 1 + from_a[q]});
      }
    }
  }

  const PlaceSizes sizes_;
  const double* loads_;
  const int32_t* home_ranks_;
  const bool stay_;
  std::vector<std::vector<int32_t>> ranks_;    // The hosts of each expert, its home first.
  std::vector<std::vector<int32_t>> of_rank_;  // The experts of each rank.
  std::vector<int32_t> homes_;                 // The number of homes on each rank.
  std::vector<int32_t> homes_left_;
  std::vector<int32_t> copies_left_;
  std::vector<double> load_;
  std::vector<int32_t> distance_;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_PLACING_H_
