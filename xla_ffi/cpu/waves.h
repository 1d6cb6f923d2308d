// What the two solvers share on the CPU: the waves, and the mapping from experts to edges and back.
#ifndef LPLB_XLA_FFI_CPU_WAVES_H_
#define LPLB_XLA_FFI_CPU_WAVES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/problem.h"

namespace lplb {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One group's replica graph and the waves on it. Edge (u, d) leads from rank u to dst[u, d].
class Waves {
 public:
  Waves(int32_t n_ranks, int32_t n_columns, const int32_t* r2o)
      : n_(n_ranks), d_(n_columns), src_(r2o), dst_(n_ranks * n_columns), level_(n_ranks) {
    for (int32_t v = 0; v < n_; ++v) {
      for (int32_t d = 0; d < d_; ++d) dst_[Edge(src_[Edge(v, d)], d)] = v;
    }
  }

  int32_t Edge(int32_t rank, int32_t column) const { return rank * d_ + column; }

  // The lower bound from the set of all ranks and from all single ranks.
  int32_t FirstTarget(const std::vector<int32_t>& base, const std::vector<int32_t>& cap) const {
    int64_t sum = 0;
    int64_t target = 0;
    for (int32_t r = 0; r < n_; ++r) {
      sum += base[r];
      int64_t stuck = base[r];
      for (int32_t d = 0; d < d_; ++d) stuck -= cap[Edge(r, d)];
      target = std::max(target, stuck);
    }
    return static_cast<int32_t>(std::max(target, CeilDiv(sum, n_)));
  }

  // Balances `load`, which must come from the valid plan `moved`, by moving up to `cap` tokens
  // along every edge, until no rank exceeds `target`. `target` must be a proven lower bound.
  // Returns the target reached.
  int32_t Run(std::vector<int32_t>& load, const std::vector<int32_t>& cap,
              std::vector<int32_t>& moved, int32_t target) {
    Run(load, cap, moved, target, [&](const std::vector<bool>& kept) {
      // The mean load of the ranks that nothing more can leave is a new lower bound.
      int64_t excess = 0;
      int64_t size = 0;
      for (int32_t r = 0; r < n_; ++r) {
        if (kept[r]) {
          excess += load[r] - target;
          ++size;
        }
      }
      target += static_cast<int32_t>(CeilDiv(excess, size));
    });
    return target;
  }

  // The same, but leaves it to `raise` to raise the target, or to shift loads that are counted
  // relative to each rank's own target. Its argument tells for every rank whether it is one that
  // nothing more can leave.
  template <typename Raise>
  void Run(std::vector<int32_t>& load, const std::vector<int32_t>& cap, std::vector<int32_t>& moved,
           const int32_t& target, Raise&& raise) {
    while (*std::max_element(load.begin(), load.end()) > target) {
      const int32_t depth = SetLevels(load, cap, moved, target);
      for (int32_t l = depth; l > 0; --l) Push(load, cap, moved, target, l);
      if (depth >= 0) continue;
      std::vector<bool> kept(n_);
      for (int32_t r = 0; r < n_; ++r) kept[r] = level_[r] < 0;
      raise(kept);
    }
  }

  const std::vector<int32_t>& dst() const { return dst_; }

 private:
  // Sets every rank's distance to the nearest rank below the target, −1 if unreached. Stops once
  // all ranks above the target have one. Returns the depth, or −1 if some of them cannot reach one.
  int32_t SetLevels(const std::vector<int32_t>& load, const std::vector<int32_t>& cap,
                    const std::vector<int32_t>& moved, int32_t target) {
    int32_t above_left = 0;
    for (int32_t r = 0; r < n_; ++r) {
      level_[r] = load[r] < target ? 0 : -1;
      above_left += load[r] > target;
    }
    int32_t depth = 0;
    for (bool progress = true; above_left > 0; ++depth) {
      if (!progress) return -1;
      progress = false;
      for (int32_t r = 0; r < n_; ++r) {
        if (level_[r] >= 0) continue;
        for (int32_t d = 0; d < d_; ++d) {
          const int32_t out = Edge(r, d);
          const int32_t in = Edge(src_[out], d);
          if ((moved[out] < cap[out] && level_[dst_[out]] == depth) ||
              (moved[in] > 0 && level_[src_[out]] == depth)) {
            level_[r] = depth + 1;
            above_left -= load[r] > target;
            progress = true;
            break;
          }
        }
      }
    }
    return depth;
  }

  // Every rank of level `l` above the target pushes its excess to level l − 1. Ranks of one level
  // use different edges, so their order does not matter.
  void Push(std::vector<int32_t>& load, const std::vector<int32_t>& cap,
            std::vector<int32_t>& moved, int32_t target, int32_t l) {
    for (int32_t r = 0; r < n_; ++r) {
      if (level_[r] != l) continue;
      int32_t excess = std::max(load[r] - target, 0);
      for (int32_t d = 0; d < d_ && excess > 0; ++d) {
        const int32_t out = Edge(r, d);
        if (level_[dst_[out]] == l - 1) {
          const int32_t send = std::min(excess, cap[out] - moved[out]);
          moved[out] += send;
          load[r] -= send;
          load[dst_[out]] += send;
          excess -= send;
        }
        const int32_t source = src_[out];
        if (level_[source] == l - 1) {
          const int32_t back = std::min(excess, moved[Edge(source, d)]);
          moved[Edge(source, d)] -= back;
          load[r] -= back;
          load[source] += back;
          excess -= back;
        }
      }
    }
  }

  int32_t n_;
  int32_t d_;
  const int32_t* src_;
  std::vector<int32_t> dst_;
  std::vector<int32_t> level_;
};

// Whether group `g` of phy2log contradicts log2phy or r2o.
inline bool Misplaced(const Problem& p, const SolveOperands& in, int32_t g) {
  const int32_t n_local = p.n_local;
  const int32_t slots = p.slots_per_rank;
  for (int32_t r = 0; r < p.group_size; ++r) {
    const int32_t first = (g * p.group_size + r) * slots;
    for (int32_t k = 0; k < slots; ++k) {
      const int32_t expert = in.phy2log[first + k];
      if (expert < 0 || expert >= p.n_logical) return true;
      const bool copy = k >= n_local;
      const int32_t* named = in.log2phy + expert * p.max_replicas;
      if (named[copy] != first + k) return true;
      if (!copy) {
        const int32_t n_named = k < p.n_redundant ? 2 : 1;
        if (std::any_of(named + n_named, named + p.max_replicas, [](int32_t s) { return s != -1; }))
          return true;
        continue;
      }
      const int32_t source = in.r2o[r * p.n_columns + (k - n_local) % p.n_columns];
      if (expert != in.phy2log[(g * p.group_size + source) * slots + k - n_local]) return true;
    }
  }
  return false;
}

// For every rank's replicated experts, [group_size, n_redundant]: the tokens that leave when
// `moved` moves along the edges. A column's experts are served in order. Uses up `moved`.
template <typename Load>
std::vector<Load> TakeInOrder(const Problem& p, const Waves& waves, const std::vector<Load>& own,
                              std::vector<Load>& moved) {
  std::vector<Load> away(static_cast<size_t>(p.group_size) * p.n_redundant);
  for (int32_t u = 0; u < p.group_size; ++u) {
    for (int32_t k = 0; k < p.n_redundant; ++k) {
      Load& left = moved[waves.Edge(u, k % p.n_columns)];
      away[u * p.n_redundant + k] = std::min(left, own[u * p.n_local + k]);
      left -= away[u * p.n_redundant + k];
    }
  }
  return away;
}

// Writes one group's quotas; `away` comes from TakeInOrder.
template <typename Load>
void WriteQuotas(const Problem& p, const Waves& waves, const std::vector<Load>& own,
                 const std::vector<Load>& away, Load* quota) {
  const int32_t slots = p.slots_per_rank;
  for (int32_t u = 0; u < p.group_size; ++u) {
    std::copy_n(&own[u * p.n_local], p.n_local, &quota[u * slots]);
    for (int32_t k = 0; k < p.n_redundant; ++k) {
      const Load of_copy = away[u * p.n_redundant + k];
      const int32_t holder = waves.dst()[waves.Edge(u, k % p.n_columns)];
      quota[u * slots + k] -= of_copy;
      quota[holder * slots + p.n_local + k] = of_copy;
    }
  }
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_WAVES_H_
