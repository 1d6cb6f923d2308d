// place_copies: copies for the batch at hand. The method, and the order that all implementations
// keep, is told in lplb_jax/reference/batch_copies.py.
#include "xla_ffi/batch_copies.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {
namespace {

// Slots of all ranks, and the tokens of the experts that are at home there.
struct Homes {
  // Experts whose home is not where log2phy says have none, nor tokens. Where all together have 2³¹
  // tokens or more, none has any.
  Homes(const Problem& p, const std::vector<int64_t>& total, const SolveOperands& in)
      : n_ranks(p.ep_size),
        slots_per_rank(p.slots_per_rank),
        most_copies(p.n_physical - p.n_logical),
        load(p.ep_size),
        tokens(p.n_physical),
        expert(p.n_physical, -1) {
    int64_t sum = 0;
    for (int32_t e = 0; e < p.n_logical; ++e) {
      const int32_t home = in.log2phy[e * p.max_replicas];
      if (home < 0 || home >= p.n_physical || in.phy2log[home] != e) continue;
      expert[home] = e;
      sum += total[e];
    }
    for (int32_t i = 0; i < p.n_physical && sum <= kInt32Max; ++i) {
      if (expert[i] < 0) continue;
      tokens[i] = static_cast<int32_t>(total[expert[i]]);
      load[i / slots_per_rank] += tokens[i];
    }
  }

  int32_t n_ranks;
  int32_t slots_per_rank;
  int32_t most_copies;          // As many as there are free slots, if all homes are right.
  std::vector<int32_t> load;    // [n_ranks]
  std::vector<int32_t> tokens;  // [n_physical]
  std::vector<int32_t> expert;  // [n_physical], −1 where a copy may go
};

// Copies with which no rank has more than a target.
class Attempt {
 public:
  Attempt(const Homes& homes, int32_t target, int32_t fan_out)
      : n_slots_(homes.slots_per_rank),
        target_(target),
        fan_out_(fan_out),
        most_copies_(homes.most_copies),
        load_(homes.load),
        tokens_(homes.tokens),
        expert_(homes.expert),
        sent_(homes.n_ranks),
        free_(homes.n_ranks) {
    for (int32_t r = 0; r < homes.n_ranks; ++r) {
      SkipToFree(r);
      if (load_[r] > target_) {
        above_.push_back(r);
        excess_ += load_[r] - target_;
      } else if (HasRoom(r)) {
        below_.push_back(r);
        room_ += target_ - load_[r];
      }
    }
  }

  // Whether there are such copies. Gives up as soon as what is left cannot fit.
  bool Run() {
    while (!above_.empty()) {
      if (excess_ > room_ || !Step()) return false;
    }
    return true;
  }

  int32_t n_copies() const { return n_copies_; }
  const std::vector<int32_t>& expert() const { return expert_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }

 private:
  // One copy more: of the busiest rank's expert with most tokens left, to the emptiest rank.
  bool Step() {
    const auto by_load = [&](int32_t q, int32_t r) { return load_[q] < load_[r]; };
    const auto busiest = std::max_element(above_.begin(), above_.end(), by_load);
    const auto emptiest = std::min_element(below_.begin(), below_.end(), by_load);
    const int32_t from = *busiest;
    const int32_t to = *emptiest;
    if (sent_[from] >= fan_out_ || n_copies_ >= most_copies_) return false;
    const auto first = tokens_.begin() + from * n_slots_;
    const auto hottest = std::max_element(first, first + n_slots_);
    const int32_t moved = std::min({load_[from] - target_, *hottest, target_ - load_[to]});
    load_[from] -= moved;
    load_[to] += moved;
    *hottest -= moved;
    excess_ -= moved;
    room_ -= moved;
    ++sent_[from];
    ++n_copies_;
    expert_[to * n_slots_ + free_[to]] = expert_[hottest - tokens_.begin()];
    tokens_[to * n_slots_ + free_[to]] = moved;
    SkipToFree(to);
    if (load_[from] == target_) above_.erase(busiest);
    if (!HasRoom(to)) {
      room_ -= target_ - load_[to];
      below_.erase(emptiest);
    }
    return true;
  }

  bool HasRoom(int32_t rank) const { return load_[rank] < target_ && free_[rank] < n_slots_; }

  void SkipToFree(int32_t rank) {
    while (free_[rank] < n_slots_ && expert_[rank * n_slots_ + free_[rank]] >= 0) ++free_[rank];
  }

  int32_t n_slots_;  // of a rank
  int32_t target_;
  int32_t fan_out_;
  int32_t most_copies_;
  int32_t n_copies_ = 0;
  int64_t excess_ = 0;           // tokens above the target
  int64_t room_ = 0;             // tokens that the ranks of `below_` can take
  std::vector<int32_t> above_;   // ranks above the target, in order
  std::vector<int32_t> below_;   // ranks below it that have a free slot, in order
  std::vector<int32_t> load_;    // [n_ranks]
  std::vector<int32_t> tokens_;  // [n_physical], at home those that are left
  std::vector<int32_t> expert_;  // [n_physical]
  std::vector<int32_t> sent_;    // [n_ranks], copies of a rank's experts
  std::vector<int32_t> free_;    // [n_ranks], the first free slot of each
};

Attempt Choose(const Homes& homes, int32_t fan_out) {
  const int64_t sum = std::accumulate(homes.load.begin(), homes.load.end(), int64_t{0});
  const int32_t mean = static_cast<int32_t>((sum + homes.n_ranks - 1) / homes.n_ranks);
  const int32_t most = *std::max_element(homes.load.begin(), homes.load.end());
  std::optional<Attempt> best;
  int32_t least = most;
  int32_t target = -1;
  for (int32_t i = 1; i <= kNTargets; ++i) {
    const int32_t before =
        std::exchange(target, mean + CopyTargetPart(CopyTargetPart(most - mean, i), i));
    if (target == before) continue;  // As near the mean of few tokens: nothing new.
    if (best && target - least > (mean >> kCopiesWorth)) break;
    Attempt attempt(homes, target, fan_out);
    if (!attempt.Run()) continue;
    if (!best) least = target;
    if (!best || attempt.n_copies() < best->n_copies()) best = std::move(attempt);
  }
  return *std::move(best);  // The last target is `most`, which needs no copies.
}

std::vector<int64_t> Totals(const Problem& p, const Sources& sources, const int32_t* loads) {
  std::vector<int64_t> total(p.n_logical);
  for (int32_t s = 0; s < sources.n_sources; ++s) {
    const int32_t* row = loads + static_cast<int64_t>(s) * sources.row;
    for (int32_t e = 0; e < p.n_logical; ++e) total[e] += std::max(row[e], 0);
  }
  return total;
}

// log2phy and logcnt of a table in which no expert is twice on a rank.
void WriteTables(const Problem& p, const SolveOperands& in, int32_t width,
                 const CopiesResults& out) {
  std::fill_n(out.log2phy, p.n_logical * width, -1);
  std::fill_n(out.logcnt, p.n_logical, 0);
  // Homes first, then the copies in the order of their slots.
  for (const bool of_homes : {true, false}) {
    for (int32_t slot = 0; slot < p.n_physical; ++slot) {
      const int32_t e = out.phy2log[slot];
      if (e < 0 || (in.log2phy[e * p.max_replicas] == slot) != of_homes) continue;
      // There is room unless other experts have no home, as in a table that contradicts itself.
      if (out.logcnt[e] < width) out.log2phy[e * width + out.logcnt[e]] = slot;
      ++out.logcnt[e];
    }
  }
}

ffi::Error RunPlaceCopies(const CopiesCall& call) {
  const Problem& p = call.problem;
  for (int64_t b = 0; b < call.batch; ++b) {
    PlaceCopies(p, call.sources, BatchElement(p, call.sources, call.in, b), call.copies.fan_out,
                call.copies.width, call.copies.Of(p, b));
  }
  return ffi::Error::Success();
}

ffi::Error RunSolveCopies(const SolveCopiesCall& call) {
  for (int64_t b = 0; b < call.batch; ++b) {
    SolveOperands in = BatchElement(call.problem, call.sources, call.in, b);
    const CopiesResults copies = call.copies.Of(call.problem, b);
    const std::vector<int32_t> start =
        PlaceCopies(call.problem, call.sources, in, call.copies.fan_out, call.copies.width, copies);
    in.phy2log = copies.phy2log;
    in.log2phy = copies.log2phy;
    Solve(call.Chosen(), call.sources, in, BatchElement(call.problem, call.split, b), Costs(),
          start.data());
  }
  return ffi::Error::Success();
}

const Register place_copies({"lplb_place_copies", CpuHandler<CopiesCall, RunPlaceCopies>});
const Register solve_copies({"lplb_solve_copies", CpuHandler<SolveCopiesCall, RunSolveCopies>});

}  // namespace

std::vector<int32_t> PlaceCopies(const Problem& problem, const Sources& sources,
                                 const SolveOperands& in, int32_t fan_out, int32_t width,
                                 const CopiesResults& out) {
  const Homes homes(problem, Totals(problem, sources, in.loads), in);
  const Attempt chosen = Choose(homes, fan_out);
  std::copy(chosen.expert().begin(), chosen.expert().end(), out.phy2log);
  WriteTables(problem, in, width, out);
  return chosen.tokens();
}

}  // namespace lplb
