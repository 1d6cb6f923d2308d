// Exact balancing of any placement: phased waves on the rank graph. Same plans as
// lplb_jax/reference/graph.py and the CUDA kernels. No XLA, no Python.
#ifndef LPLB_XLA_FFI_CPU_GRAPH_WAVES_H_
#define LPLB_XLA_FFI_CPU_GRAPH_WAVES_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "xla_ffi/cpu/graph.h"

namespace lplb {

// Balances any number of batches on one graph, which must outlive it:
//
//   const ReplicaGraph graph(n_ranks, n_logical, slots_per_rank, phy2log);
//   GraphWaves waves(graph);
//   int64_t max_load = waves.Run(loads);  // What no split can go below, and this one reaches.
//
// A rank above the target sends its excess along shortest paths to ranks below it: its arcs lead to
// every host of the experts that it has tokens of. If there is no path, the ranks that cannot get
// rid of their tokens are a set whose mean load is a higher bound, to which the target then rises.
class GraphWaves {
 public:
  explicit GraphWaves(const ReplicaGraph& graph)
      : graph_(graph),
        tokens_(graph.rank.size()),
        load_(graph.n_ranks),
        proof_(graph.n_ranks),
        level_(graph.n_ranks),
        expert_level_(graph.n_logical) {
    reached_.reserve(graph.n_ranks);
  }

  // Splits `loads` [n_logical], all ≥ 0; an expert without a slot counts as 0. Sums must stay below
  // 2⁶³. Returns the largest rank load, which is the lower bound that `Proof` gives.
  template <typename Load>
  int64_t Run(const Load* loads) {
    return Finish(Start(loads));
  }

  // Every expert's tokens are divided evenly among its hosts, the first ones get one more; ranks
  // have `base` [n_ranks] besides, if that is not null, all ≥ 0. Returns the first target, which is
  // the bound of the set of all ranks and of the sets of one rank.
  template <typename Load>
  int64_t Start(const Load* loads, const int64_t* base = nullptr) {
    std::vector<int64_t>& fixed = stays_;
    fixed.assign(graph_.n_ranks, 0);
    if (base != nullptr) fixed.assign(base, base + graph_.n_ranks);
    load_ = fixed;
    int64_t sum = std::accumulate(fixed.begin(), fixed.end(), int64_t{0});
    for (int32_t e = 0; e < graph_.n_logical; ++e) {
      const int32_t begin = graph_.first[e];
      const int32_t n_hosts = graph_.Hosts(e);
      if (n_hosts == 0) continue;
      const int64_t total = loads[e];
      sum += total;
      if (n_hosts == 1) {
        tokens_[begin] = total;
        load_[graph_.rank[begin]] += total;
        fixed[graph_.rank[begin]] += total;
        continue;
      }
      const int64_t each = total / n_hosts;
      const int64_t more = total % n_hosts;
      for (int32_t k = 0; k < n_hosts; ++k) {
        tokens_[begin + k] = each + (k < more);
        load_[graph_.rank[begin + k]] += each + (k < more);
      }
    }
    const int64_t mean = (sum + graph_.n_ranks - 1) / graph_.n_ranks;
    target_ = std::max(mean, *std::max_element(fixed.begin(), fixed.end()));
    for (int32_t r = 0; r < graph_.n_ranks; ++r) proof_[r] = target_ == mean || fixed[r] == target_;
    return target_;
  }

  // Splits shared experts as these quotas of all slots do, instead of evenly.
  void TakeSplit(const int32_t* quota) {
    for (const auto& [e, c] : graph_.shared) {
      const int64_t tokens = quota[graph_.slot[c]];
      load_[graph_.rank[c]] += tokens - tokens_[c];
      tokens_[c] = tokens;
    }
  }

  // From the legal plan that tokens() and load() hold. `target` must be proven.
  int64_t Finish(int64_t target) {
    return Finish(target, [this](const std::vector<bool>&) { RaiseTarget(); });
  }

  // Likewise, where `raise` does what is to be done with loads that are counted from one of each
  // rank's own. Its argument says of every rank whether nothing more can leave it.
  template <typename Raise>
  int64_t Finish(int64_t target, Raise&& raise) {
    target_ = target;
    while (*std::max_element(load_.begin(), load_.end()) > target_) {
      if (SetLevels()) {
        PushAll();
      } else {
        for (int32_t r = 0; r < graph_.n_ranks; ++r) proof_[r] = level_[r] < 0;
        raise(proof_);
      }
    }
    return target_;
  }

  // Likewise where tokens() are empty places, and load() what ranks have of them, counted from one
  // number for each: until none has less than the target. Ranks that have more push that along
  // shortest paths to those that have less. If none of them finds a way, nothing gets into the
  // ranks that could be reached from, and the target falls to their mean. Returns it.
  int64_t HandOut(int64_t target) {
    target_ = target;
    while (*std::min_element(load_.begin(), load_.end()) < target_) {
      SetLevels();
      const bool some_have_more = std::any_of(reached_.begin(), reached_.end(),
                                              [this](int32_t r) { return load_[r] > target_; });
      if (some_have_more) {
        PushAll();
      } else {
        int64_t lack = 0;
        for (const int32_t r : reached_) lack += target_ - load_[r];
        const int64_t n = static_cast<int64_t>(reached_.size());
        target_ -= (lack + n - 1) / n;
      }
    }
    return target_;
  }

  // Tokens of every cell of the graph, and of every rank.
  std::vector<int64_t>& tokens() { return tokens_; }
  std::vector<int64_t>& load() { return load_; }

  // Ranks S for which ⌈tokens that cannot leave S / |S|⌉ is what Run returned.
  const std::vector<bool>& Proof() const { return proof_; }

  // Tokens that every slot serves, [n_physical].
  template <typename Quota>
  void WriteQuotas(Quota* quota, int32_t n_physical) const {
    std::fill_n(quota, n_physical, Quota{0});
    for (size_t c = 0; c < tokens_.size(); ++c) {
      quota[graph_.slot[c]] = static_cast<Quota>(tokens_[c]);
    }
  }

 private:
  // A push is divided among so many ranks at most: more take longer than the phases they save.
  static constexpr int32_t kMaxSpread = 4;

  // Distance of every rank to the nearest one below the target, −1 where not reached; stops when
  // all ranks above the target have one. `reached_` are the ranks in the order of their distance.
  // Returns whether all ranks above the target were reached.
  bool SetLevels() {
    int32_t above_left = 0;
    reached_.clear();
    for (int32_t r = 0; r < graph_.n_ranks; ++r) {
      level_[r] = load_[r] < target_ ? 0 : -1;
      above_left += load_[r] > target_;
      if (level_[r] == 0) reached_.push_back(r);
    }
    std::fill(expert_level_.begin(), expert_level_.end(), -1);
    size_t begin = 0;
    for (int32_t depth = 0; above_left > 0; ++depth) {
      const size_t end = reached_.size();
      if (begin == end) return false;
      for (; begin < end; ++begin) {
        const int32_t q = reached_[begin];
        for (int32_t i = graph_.first_shared[q]; i < graph_.first_shared[q + 1]; ++i) {
          const int32_t e = graph_.shared[i].expert;
          // The first rank that reaches an expert reaches all that have tokens of it.
          if (expert_level_[e] >= 0) continue;
          expert_level_[e] = depth;
          for (int32_t c = graph_.first[e]; c < graph_.first[e + 1]; ++c) {
            const int32_t r = graph_.rank[c];
            if (level_[r] >= 0 || tokens_[c] == 0) continue;
            level_[r] = depth + 1;
            above_left -= load_[r] > target_;
            reached_.push_back(r);
          }
        }
      }
    }
    return true;
  }

  // Nothing more can leave the ranks of the proof: their mean load is a new lower bound.
  void RaiseTarget() {
    int64_t excess = 0;
    int64_t n = 0;
    for (int32_t r = 0; r < graph_.n_ranks; ++r) {
      if (!proof_[r]) continue;
      excess += load_[r] - target_;
      ++n;
    }
    target_ += (excess + n - 1) / n;
  }

  // The deepest level first; within a level the order does not matter.
  void PushAll() {
    for (auto r = reached_.rbegin(); r != reached_.rend() && level_[*r] > 0; ++r) {
      if (load_[*r] > target_) Push(*r, load_[*r] - target_);
    }
  }

  // Rank r sends its excess to the level below its own, as far as its cells have their parts of it.
  void Push(int32_t r, int64_t excess) {
    const int32_t below = level_[r] - 1;
    // A host that is nearer than `below` would have put r nearer, too.
    const auto sends = [&](const ReplicaGraph::Shared& cell) {
      return tokens_[cell.cell] > 0 && expert_level_[cell.expert] == below;
    };
    const auto first = graph_.shared.begin() + graph_.first_shared[r];
    const auto last = graph_.shared.begin() + graph_.first_shared[r + 1];
    const int64_t n_senders = std::count_if(first, last, sends);
    // The least power of two that gives every sender one part, and the first ones two.
    int64_t n_parts = 1;
    while (n_parts < n_senders) n_parts *= 2;
    const auto part = [&](int64_t i) {
      return i < n_parts ? excess / n_parts + (i < excess % n_parts) : 0;
    };
    int64_t sender = 0;
    for (auto cell = first; cell != last; ++cell) {
      if (!sends(*cell)) continue;
      Send(r, *cell, std::min(part(sender) + part(sender + n_senders), tokens_[cell->cell]));
      ++sender;
    }
  }

  // To the first of the expert's hosts at the level below in cyclic order after r, in equal parts;
  // the lowest ranks get one more.
  void Send(int32_t r, const ReplicaGraph::Shared& from, int64_t amount) {
    int32_t to[kMaxSpread];
    int32_t n = 0;
    const int32_t begin = graph_.first[from.expert];
    const int32_t end = graph_.first[from.expert + 1];
    for (int32_t c = from.cell + 1; n < kMaxSpread; ++c) {
      if (c == end) c = begin;
      if (c == from.cell) break;
      if (level_[graph_.rank[c]] == level_[r] - 1) to[n++] = c;
    }
    std::sort(to, to + n);
    for (int32_t k = 0; k < n; ++k) {
      const int64_t part = amount / n + (k < amount % n);
      tokens_[to[k]] += part;
      load_[graph_.rank[to[k]]] += part;
    }
    tokens_[from.cell] -= amount;
    load_[r] -= amount;
  }

  const ReplicaGraph& graph_;
  std::vector<int64_t> tokens_;
  std::vector<int64_t> load_;
  std::vector<int64_t> stays_;
  int64_t target_ = 0;
  std::vector<bool> proof_;
  std::vector<int32_t> level_;
  std::vector<int32_t> expert_level_;  // The least level of an expert's hosts, −1 if not reached.
  std::vector<int32_t> reached_;
};

// Where every expert is at home, −1 where it has no slot: the balanced loads of one token each, so
// that the ranks are home of as even a number of experts as the placement allows.
inline void FindHomes(const ReplicaGraph& graph, int32_t* homes) {
  GraphWaves waves(graph);
  waves.Run(std::vector<int32_t>(graph.n_logical, 1).data());
  for (int32_t e = 0; e < graph.n_logical; ++e) {
    homes[e] = -1;
    for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
      if (waves.tokens()[c] > 0) homes[e] = graph.slot[c];
    }
  }
}

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_GRAPH_WAVES_H_
