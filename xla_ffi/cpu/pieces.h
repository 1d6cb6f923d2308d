// From quotas to tokens: how one source deals its tokens of each expert to the expert's slots.
#ifndef LPLB_XLA_FFI_CPU_PIECES_H_
#define LPLB_XLA_FFI_CPU_PIECES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/problem.h"
#include "xla_ffi/cpu/graph.h"

namespace lplb {

// The source's tokens of an expert go to the slot of its first piece until `end` of them have been
// dealt, then to the slot of the next piece. The last piece takes all remaining tokens.
struct Piece {
  int32_t slot;  // −1: its tokens get none
  int32_t end;
};

// The pieces of all experts. Each expert has at least one, and none is empty.
class Pieces {
 public:
  explicit Pieces(const Problem& problem) : first_(1) {
    first_.reserve(problem.n_logical + 1);
    pieces_.reserve(problem.n_physical + problem.n_logical);
  }

  // The next `take` tokens of the current expert go to `slot`.
  void Add(int32_t slot, int64_t take) {
    if (take <= 0) return;
    const int32_t dealt = Started() ? pieces_.back().end : 0;
    pieces_.push_back({slot, static_cast<int32_t>(dealt + take)});
  }

  // Ends the current expert. Tokens beyond its pieces go where its last piece goes. If it has none,
  // they go to `otherwise`.
  void EndExpert(int32_t otherwise) {
    if (!Started()) pieces_.push_back({otherwise, 0});
    pieces_.back().end = kInt32Max;
    first_.push_back(static_cast<int32_t>(pieces_.size()));
  }

  const Piece* begin(int32_t expert) const { return &pieces_[first_[expert]]; }

 private:
  bool Started() const { return static_cast<int32_t>(pieces_.size()) > first_.back(); }

  std::vector<Piece> pieces_;
  std::vector<int32_t> first_;
};

// Along a topology: home keeps this source's part of its quota, and the replica gets the rest.
inline Pieces PiecesAlongTopology(const Problem& p, const Sources& sources,
                                  const AssignOperands& in, bool proportional) {
  Pieces pieces(p);
  for (int32_t e = 0; e < p.n_logical; ++e) {
    const Route route = SlotsOf(p, in.phy2log, in.log2phy, e);
    const int32_t keep = KeepOf(p, sources, in.counts, in.quota, *in.rank, proportional, e, route);
    pieces.Add(route.home, keep);
    if (keep < kInt32Max) pieces.Add(route.replica, kInt32Max - keep);
    pieces.EndExpert(route.home);
  }
  return pieces;
}

// Any placement. local_shares in lplb_jax/reference/assignment.py explains the rule, and why no
// other rule keeps more tokens where they are.
class LocalPieces {
 public:
  LocalPieces(const Problem& problem, const Sources& sources, const AssignOperands& in,
              bool proportional)
      : p_(problem),
        sources_(sources),
        in_(in),
        proportional_(proportional),
        me_(*in.rank),
        graph_(p_.ep_size, p_.n_logical, p_.slots_per_rank, in.phy2log),
        pieces_(problem),
        nodes_(p_.ep_size / p_.node_size) {}

  Pieces Make() {
    for (int32_t e = 0; e < p_.n_logical; ++e) {
      // With one host, nothing depends on quotas.
      if (graph_.Hosts(e) > 1) {
        ReadQuotas(e);
        if (proportional_) {
          DealShares(e);
        } else if (sources_.n_sources == 1) {
          DealAll(e);
        } else {
          DealByDistance(e);
        }
      }
      pieces_.EndExpert(graph_.HomeOf(e, in_.log2phy[e * p_.max_replicas]));
    }
    return std::move(pieces_);
  }

 private:
  // The two sides of a node's line, and where its remaining room begins on the line over all nodes.
  struct Node {
    int64_t supply = 0;
    int64_t demand = 0;
    int64_t first = 0;
    int64_t upto = 0;
  };

  // Tokens of an expert on a line: [begin, end).
  struct Interval {
    int64_t begin;
    int64_t end;

    int64_t Overlap(int64_t first, int64_t last) const {
      return std::min(end, last) - std::max(begin, first);
    }
  };

  // Quotas count up to a running sum of 2³¹ − 1. Negative ones count as 0.
  void ReadQuotas(int32_t e) {
    quota_.clear();
    int64_t sum = 0;
    for (int32_t c = graph_.first[e]; c < graph_.first[e + 1]; ++c) {
      const int64_t quota =
          std::min<int64_t>(std::max(in_.quota[graph_.slot[c]], 0), kInt32Max - sum);
      quota_.push_back(quota);
      sum += quota;
    }
  }

  int32_t CountOf(int32_t source, int32_t e) const {
    return std::max(in_.counts[static_cast<int64_t>(source) * sources_.row + e], 0);
  }

  void DealAll(int32_t e) {
    for (size_t k = 0; k < quota_.size(); ++k) pieces_.Add(SlotOf(e, k), quota_[k]);
  }

  void DealShares(int32_t e) {
    int64_t load = 0;
    for (const int64_t quota : quota_) load += quota;
    if (load == 0) return;
    const int32_t count = CountOf(0, e);
    int64_t upto = 0;
    int32_t dealt = 0;
    for (size_t k = 0; k < quota_.size(); ++k) {
      upto += quota_[k];
      const int32_t share = ProportionalShare(count, static_cast<int32_t>(upto),
                                              static_cast<int32_t>(load), me_, p_.ep_size);
      pieces_.Add(SlotOf(e, k), share - dealt);
      dealt = share;
    }
  }

  void DealByDistance(int32_t e) {
    const int32_t here = me_ / p_.node_size;
    Interval mine = MeetInNodes(e);
    for (size_t k = 0; k < quota_.size(); ++k) {
      if (RankOf(e, k) == me_) pieces_.Add(SlotOf(e, k), own_[k]);
    }
    for (size_t k = 0; k < quota_.size(); ++k) {
      if (RankOf(e, k) / p_.node_size != here) continue;
      const int64_t first = nodes_[here].upto;
      nodes_[here].upto += quota_[k] - own_[k];
      pieces_.Add(SlotOf(e, k), mine.Overlap(first, nodes_[here].upto));
    }
    // Tokens beyond the end of the node's line continue on the line over all nodes.
    const int64_t beyond = mine.end - std::max(mine.begin, nodes_[here].demand);
    if (beyond <= 0) return;
    mine.begin = std::max<int64_t>(mine.begin - nodes_[here].demand, 0);
    int64_t spare = 0;
    for (int32_t v = 0; v < static_cast<int32_t>(nodes_.size()); ++v) {
      Node& node = nodes_[v];
      if (v < here) mine.begin += std::max<int64_t>(node.supply - node.demand, 0);
      node.first = spare;
      spare += std::max<int64_t>(node.demand - node.supply, 0);
    }
    mine.end = mine.begin + beyond;
    for (size_t k = 0; k < quota_.size(); ++k) {
      const int32_t v = RankOf(e, k) / p_.node_size;
      if (v == here) continue;
      Node& node = nodes_[v];
      const int64_t first = node.first + std::max<int64_t>(node.upto - node.supply, 0);
      node.upto += quota_[k] - own_[k];
      pieces_.Add(SlotOf(e, k),
                  mine.Overlap(first, node.first + std::max<int64_t>(node.upto - node.supply, 0)));
    }
  }

  // Computes how many of their own tokens the hosts keep, and both sides of every node's line.
  // Returns this source's interval on its node's line.
  Interval MeetInNodes(int32_t e) {
    std::fill(nodes_.begin(), nodes_.end(), Node());
    const int32_t here = me_ / p_.node_size;
    Interval mine = {0, CountOf(me_, e)};
    for (int32_t v = 0, s = 0; v < static_cast<int32_t>(nodes_.size()); ++v) {
      for (; s < (v + 1) * p_.node_size; ++s) {
        const int32_t count = CountOf(s, e);
        nodes_[v].supply += count;
        if (v == here && s < me_) mine.begin += count;
      }
    }
    own_.clear();
    for (size_t k = 0; k < quota_.size(); ++k) {
      const int32_t r = RankOf(e, k);
      const int64_t own = std::min<int64_t>(CountOf(r, e), quota_[k]);
      own_.push_back(own);
      Node& node = nodes_[r / p_.node_size];
      node.supply -= own;
      node.demand += quota_[k] - own;
      if (r == me_) mine.end -= own;
      if (r / p_.node_size == here && r < me_) mine.begin -= own;
    }
    mine.end += mine.begin;
    return mine;
  }

  int32_t SlotOf(int32_t e, size_t k) const { return graph_.slot[graph_.first[e] + k]; }
  int32_t RankOf(int32_t e, size_t k) const { return graph_.rank[graph_.first[e] + k]; }

  const Problem& p_;
  const Sources& sources_;
  const AssignOperands& in_;
  const bool proportional_;
  const int32_t me_;
  const ReplicaGraph graph_;
  Pieces pieces_;
  std::vector<Node> nodes_;
  std::vector<int64_t> quota_;  // of the expert's cells
  std::vector<int64_t> own_;    // how many of their own tokens the cells' ranks keep
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_PIECES_H_
