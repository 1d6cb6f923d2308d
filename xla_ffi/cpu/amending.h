// Changes the current placement step by step until it suits other loads. No XLA, no Python.
#ifndef LPLB_XLA_FFI_CPU_AMENDING_H_
#define LPLB_XLA_FFI_CPU_AMENDING_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "xla_ffi/cpu/graph.h"
#include "xla_ffi/cpu/graph_waves.h"

namespace lplb {

// The sizes of a placement, and how it may change.
struct AmendSizes {
  int32_t n_ranks;
  int32_t n_logical;
  int32_t slots_per_rank;
  int32_t ranks_per_node;
  bool swaps_only;  // Along a topology: experts exchange all their slots.

  int32_t n_physical() const { return n_ranks * slots_per_rank; }
};

// Loads to balance, `loads` [n_batches, n_logical], each batch with a positive total. `over_mean`
// [n_batches] is the ratio of largest to mean rank load that is good enough for each batch.
struct Goals {
  const int64_t* loads;
  const double* over_mean;
  int32_t n_batches;
};

// Changes `phy2log` and `homes` in place until all batches reach their goals. The exact solver
// identifies the sets of ranks that stand in the way. Among the steps that let load leave those
// sets, the most promising are tried, and the one that gains most per moved expert is taken.
class Amending {
 public:
  Amending(const AmendSizes& sizes, const Goals& goals, int32_t* phy2log, int32_t* homes)
      : sizes_(sizes), goals_(goals), phy2log_(phy2log), homes_(homes), graph_(Graph()) {}

  // Returns the sum over batches of the remaining excess over their goals. It is 0 if all reach
  // them. Otherwise no step helps, or the solver has run `most_solves` times.
  double Run(int64_t most_solves) {
    double excess = Look();
    for (int64_t left = most_solves - goals_.n_batches; excess > 0 && left > 0;) {
      const std::vector<Step> steps = Promising();
      const Step* best = nullptr;
      double best_gain = 0;
      for (const Step& step : steps) {
        Take(step);
        const double gain = (excess - Excess()) / step.cost;
        TakeBack(step);
        left -= goals_.n_batches;
        if (gain > best_gain) {
          best = &step;
          best_gain = gain;
        }
      }
      if (best == nullptr) break;
      Take(*best);
      excess = Look();
      left -= goals_.n_batches;
    }
    return excess;
  }

 private:
  // How many steps of each kind are tried at a time.
  static constexpr size_t kTried = 6;

  enum class Kind {
    kCopy,      // Slot `to`, a copy of `f` or empty, gets a copy of `e`.
    kExchange,  // The homes of `e` and `f` exchange experts.
    kSwap,      // All slots of `e` and `f` are exchanged.
  };

  struct Step {
    Kind kind;
    double value;  // Estimated load that leaves, minus the load that replaces it.
    int32_t cost;  // Experts that move. Moves to another node count twice.
    int32_t e;
    int32_t f;
    int32_t to;

    bool operator<(const Step& other) const {
      const double ours = value / cost;
      const double others = other.value / other.cost;
      if (ours != others) return ours > others;
      return e != other.e ? e < other.e : to < other.to;
    }
  };

  void Take(const Step& step) { Change(step, step.e, step.f); }
  void TakeBack(const Step& step) { Change(step, step.f, step.e); }

  void Change(const Step& step, int32_t e, int32_t f) {
    switch (step.kind) {
      case Kind::kCopy:
        phy2log_[step.to] = e;
        return;
      case Kind::kExchange:
        std::swap(phy2log_[homes_[e]], phy2log_[homes_[f]]);
        break;
      case Kind::kSwap:
        for (int32_t p = 0; p < sizes_.n_physical(); ++p) {
          int32_t& expert = phy2log_[p];
          expert = expert == e ? f : expert == f ? e : expert;
        }
        break;
    }
    std::swap(homes_[e], homes_[f]);
  }

  ReplicaGraph Graph() const {
    return ReplicaGraph(sizes_.n_ranks, sizes_.n_logical, sizes_.slots_per_rank, phy2log_);
  }

  const int64_t* Loads(int32_t b) const {
    return goals_.loads + static_cast<int64_t>(b) * sizes_.n_logical;
  }

  // One token of the batch, in units of the mean rank load.
  double Unit(int32_t b) const {
    int64_t sum = 0;
    for (int32_t e = 0; e < sizes_.n_logical; ++e) sum += Loads(b)[e];
    return sizes_.n_ranks / static_cast<double>(sum);
  }

  // By how much the batch exceeds its goal; the waves are run. Of several sets of ranks that are in
  // the way to the same degree a step may relieve one, so that fewer ranks count as less, slightly.
  double Over(GraphWaves& waves, int32_t b) const {
    const double over_mean = static_cast<double>(waves.Run(Loads(b))) * Unit(b);
    if (over_mean <= goals_.over_mean[b]) return 0;
    const std::vector<bool>& tight = waves.Proof();
    const auto n_tight = static_cast<double>(std::count(tight.begin(), tight.end(), true));
    return over_mean - goals_.over_mean[b] + 1e-6 * n_tight / sizes_.n_ranks;
  }

  double Excess() const {
    const ReplicaGraph graph = Graph();
    GraphWaves waves(graph);
    double excess = 0;
    for (int32_t b = 0; b < goals_.n_batches; ++b) {
      excess += Over(waves, b);
    }
    return excess;
  }

  // Returns the same as Excess, and prepares what the estimates of steps use: sums over the batches
  // that exceed their goals, in units of the mean rank load.
  double Look() {
    graph_ = Graph();
    GraphWaves waves(graph_);
    double excess = 0;
    need_ = 0;
    load_.assign(sizes_.n_logical, 0);
    confined_.assign(sizes_.n_logical, 0);
    n_outside_.assign(sizes_.n_logical, sizes_.n_ranks);
    room_.assign(sizes_.n_ranks, 0);
    tight_.assign(sizes_.n_ranks, false);
    served_.assign(sizes_.n_physical(), 0);
    hosts_.assign(static_cast<size_t>(sizes_.n_logical) * sizes_.n_ranks, false);
    for (int32_t b = 0; b < goals_.n_batches; ++b) {
      const double unit = Unit(b);
      const double goal = goals_.over_mean[b];
      const double over = Over(waves, b);
      if (over == 0) continue;
      excess += over;
      const std::vector<bool>& tight = waves.Proof();
      for (int32_t r = 0; r < sizes_.n_ranks; ++r) {
        room_[r] += goal - static_cast<double>(waves.load()[r]) * unit;
        if (!tight[r]) continue;
        tight_[r] = true;
        need_ -= goal;
      }
      for (int32_t e = 0; e < sizes_.n_logical; ++e) {
        const double load = static_cast<double>(Loads(b)[e]) * unit;
        int32_t n_outside = 0;
        for (int32_t c = graph_.first[e]; c < graph_.first[e + 1]; ++c) {
          n_outside += !tight[graph_.rank[c]];
          served_[graph_.slot[c]] += static_cast<double>(waves.tokens()[c]) * unit;
        }
        load_[e] += load;
        n_outside_[e] = std::min(n_outside_[e], n_outside);
        if (n_outside > 0) continue;
        confined_[e] += load;
        need_ += load;
      }
    }
    for (int32_t e = 0; e < sizes_.n_logical; ++e) {
      for (int32_t c = graph_.first[e]; c < graph_.first[e + 1]; ++c) {
        hosts_[static_cast<size_t>(e) * sizes_.n_ranks + graph_.rank[c]] = true;
      }
    }
    return excess;
  }

  // The best steps of a kind, in order.
  class Shortlist {
   public:
    void Add(const Step& step) {
      if (steps_.size() == kTried && !(step < steps_.back())) return;
      if (steps_.size() == kTried) steps_.pop_back();
      steps_.insert(std::upper_bound(steps_.begin(), steps_.end(), step), step);
    }
    const std::vector<Step>& steps() const { return steps_; }

   private:
    std::vector<Step> steps_;
  };

  std::vector<Step> Promising() const {
    if (sizes_.swaps_only) return Exchanges(Kind::kSwap).steps();
    std::vector<Step> steps = Copies().steps();
    const Shortlist exchanges = Exchanges(Kind::kExchange);
    steps.insert(steps.end(), exchanges.steps().begin(), exchanges.steps().end());
    return steps;
  }

  bool Hosts(int32_t e, int32_t r) const {
    return hosts_[static_cast<size_t>(e) * sizes_.n_ranks + r];
  }

  int32_t RankOf(int32_t slot) const { return slot / sizes_.slots_per_rank; }

  int32_t Cost(int32_t moved, int32_t from, int32_t to) const {
    const bool same_node =
        RankOf(from) / sizes_.ranks_per_node == RankOf(to) / sizes_.ranks_per_node;
    return same_node ? moved : 2 * moved;
  }

  // The number of ranks that must fetch expert e if it gets the slots of f.
  int32_t Fetches(int32_t e, int32_t f) const {
    int32_t n = 0;
    for (int32_t c = graph_.first[f]; c < graph_.first[f + 1]; ++c) n += !Hosts(e, graph_.rank[c]);
    return n;
  }

  // The heaviest confined experts get a copy where there is room and where the copy that it
  // replaces serves little.
  Shortlist Copies() const {
    std::vector<int32_t> experts;
    for (int32_t e = 0; e < sizes_.n_logical; ++e) {
      if (confined_[e] > 0) experts.push_back(e);
    }
    std::stable_sort(experts.begin(), experts.end(),
                     [&](int32_t a, int32_t b) { return confined_[a] > confined_[b]; });
    experts.resize(std::min(experts.size(), kTried));
    Shortlist steps;
    for (int32_t to = 0; to < sizes_.n_physical(); ++to) {
      const int32_t f = phy2log_[to];
      if (tight_[RankOf(to)] || (f >= 0 && homes_[f] == to)) continue;
      for (const int32_t e : experts) {
        if (Hosts(e, RankOf(to))) continue;
        const double out = std::min({confined_[e], need_, room_[RankOf(to)] + served_[to]});
        if (out <= served_[to]) continue;
        steps.Add({Kind::kCopy, out - served_[to], Cost(1, homes_[e], to), e, f, to});
      }
    }
    return steps;
  }

  // Confined experts exchange slots with experts outside that have less load.
  Shortlist Exchanges(Kind kind) const {
    Shortlist steps;
    for (int32_t e = 0; e < sizes_.n_logical; ++e) {
      if (confined_[e] == 0) continue;
      const int32_t from = homes_[e];
      for (int32_t f = 0; f < sizes_.n_logical; ++f) {
        const int32_t to = homes_[f];
        bool confines = true;
        int32_t moved = 2;
        if (kind == Kind::kSwap) {
          if (n_outside_[f] == 0) continue;
          moved = Fetches(e, f) + Fetches(f, e);
        } else {
          if (tight_[RankOf(to)] || Hosts(e, RankOf(to)) || Hosts(f, RankOf(from))) continue;
          confines = n_outside_[f] <= 1;
        }
        const double out = confined_[e] - (confines ? load_[f] : 0);
        const double too_much = std::max(out - std::max(room_[RankOf(to)], 0.0), 0.0);
        const double value = std::min(out, need_) - too_much;
        if (value > 0) steps.Add({kind, value, Cost(moved, from, to), e, f, to});
      }
    }
    return steps;
  }

  const AmendSizes sizes_;
  const Goals goals_;
  int32_t* phy2log_;
  int32_t* homes_;
  // See Look.
  ReplicaGraph graph_;
  double need_ = 0;                 // Load that must leave the tight sets.
  std::vector<double> load_;        // [n_logical]
  std::vector<double> confined_;    // [n_logical], the part that cannot leave a tight set
  std::vector<int32_t> n_outside_;  // [n_logical], least number of hosts outside the tight set
  std::vector<double> room_;        // [n_ranks], up to the goal
  std::vector<bool> tight_;         // [n_ranks], in the tight set of some batch
  std::vector<double> served_;      // [n_physical]
  std::vector<bool> hosts_;         // [n_logical, n_ranks]
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_AMENDING_H_
