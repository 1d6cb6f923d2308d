// solve: the exact integer solver. Same phases and order as lplb_jax/reference/solver.py and
// cuda/solver.cu, so that all three give the same bits.
#include "xla_ffi/solver.h"

#include <algorithm>
#include <vector>

#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/steps.h"

namespace lplb {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

  // Balances `load` by moving up to `cap` tokens along every edge; returns the target reached.
  int32_t Run(std::vector<int32_t>& load, const std::vector<int32_t>& cap,
              std::vector<int32_t>& moved) {
    int64_t sum = 0;
    int32_t target = 0;
    for (int32_t r = 0; r < n_; ++r) {
      sum += load[r];
      int64_t stuck = load[r];
      for (int32_t d = 0; d < d_; ++d) stuck -= cap[Edge(r, d)];
      target = std::max<int64_t>(target, stuck);
    }
    target = std::max<int64_t>(target, CeilDiv(sum, n_));

    while (*std::max_element(load.begin(), load.end()) > target) {
      const int32_t depth = SetLevels(load, cap, moved, target);
      if (depth >= 0) {
        for (int32_t l = depth; l > 0; --l) Push(load, cap, moved, target, l);
        continue;
      }
      // Nothing more can leave the unseen ranks: their mean load is a new lower bound.
      int64_t excess = 0;
      int64_t unseen = 0;
      for (int32_t r = 0; r < n_; ++r) {
        if (level_[r] < 0) {
          excess += load[r] - target;
          ++unseen;
        }
      }
      target += static_cast<int32_t>(CeilDiv(excess, unseen));
    }
    return target;
  }

  const std::vector<int32_t>& dst() const { return dst_; }

 private:
  // Distance of every rank to the nearest one below the target, −1 where not reached; stops when
  // all ranks above the target have one. Returns the depth, −1 if some of them is out of reach.
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
bool Misplaced(const Problem& p, const SolveOperands& in, int32_t g) {
  const int32_t n_local = p.n_local;
  const int32_t slots = p.slots_per_rank;
  for (int32_t r = 0; r < p.group_size; ++r) {
    const int32_t first = (g * p.group_size + r) * slots;
    for (int32_t k = 0; k < slots; ++k) {
      const int32_t expert = in.phy2log[first + k];
      if (expert < 0 || expert >= p.n_logical) return true;
      const bool copy = k >= n_local;
      if (in.log2phy[expert * p.max_replicas + copy] != first + k) return true;
      if (!copy) continue;
      const int32_t source = in.r2o[r * p.n_columns + (k - n_local) % p.n_columns];
      if (expert != in.phy2log[(g * p.group_size + source) * slots + k - n_local]) return true;
    }
  }
  return false;
}

void SolveGroup(const Problem& p, const SolveOperands& in, const std::vector<int64_t>& total,
                const std::vector<bool>& negative, int32_t g, int32_t status,
                const SolveResults& out) {
  const int32_t n_ranks = p.group_size;
  const int32_t n_columns = p.n_columns;
  const int32_t n_local = p.n_local;
  const int32_t n_redundant = p.n_redundant;
  const int32_t slots = p.slots_per_rank;
  const int64_t first_slot = static_cast<int64_t>(g) * n_ranks * slots;

  std::vector<int32_t> own(static_cast<size_t>(n_ranks) * n_local);
  std::vector<int64_t> base(n_ranks);
  std::vector<int64_t> column(static_cast<size_t>(n_ranks) * n_columns);
  Waves waves(n_ranks, n_columns, in.r2o);
  bool overflow = false;
  for (int32_t r = 0; r < n_ranks; ++r) {
    for (int32_t k = 0; k < n_local; ++k) {
      const int32_t expert = std::clamp(in.phy2log[first_slot + r * slots + k], 0, p.n_logical - 1);
      overflow |= total[expert] > kInt32Max;
      if (negative[expert]) status |= kNegativeLoad;
      own[r * n_local + k] = static_cast<int32_t>(std::min<int64_t>(total[expert], kInt32Max));
      base[r] += own[r * n_local + k];
      if (k < n_redundant && waves.dst()[waves.Edge(r, k % n_columns)] != r) {
        column[waves.Edge(r, k % n_columns)] += own[r * n_local + k];
      }
    }
  }
  // A plan's rank loads never pass this sum, so where it fits nothing in the waves overflows.
  for (int32_t v = 0; v < n_ranks; ++v) {
    int64_t most = base[v];
    for (int32_t d = 0; d < n_columns; ++d) {
      most += column[waves.Edge(in.r2o[waves.Edge(v, d)], d)];
    }
    overflow |= most > kInt32Max;
  }

  std::vector<int32_t> load(n_ranks);
  std::vector<int32_t> cap(column.size());
  std::vector<int32_t> moved(column.size());
  if (!overflow) {
    std::copy(base.begin(), base.end(), load.begin());
    std::copy(column.begin(), column.end(), cap.begin());
  }
  out.lower_bound[g] = waves.Run(load, cap, moved);
  out.max_load[g] = overflow ? kInt32Max : *std::max_element(load.begin(), load.end());
  if (overflow) status |= kLoadOverflow;
  if (Misplaced(p, in, g)) status |= kBadPlacement;
  out.status[g] = status;

  // The moved tokens of a column come from its experts in order.
  int32_t* quota = out.quota + first_slot;
  for (int32_t u = 0; u < n_ranks; ++u) {
    std::copy_n(&own[u * n_local], n_local, &quota[u * slots]);
    for (int32_t k = 0; k < n_redundant; ++k) {
      const int32_t edge = waves.Edge(u, k % n_columns);
      const int32_t away = std::min(moved[edge], own[u * n_local + k]);
      moved[edge] -= away;
      quota[u * slots + k] -= away;
      quota[waves.dst()[edge] * slots + n_local + k] = away;
    }
  }
}

}  // namespace

void Solve(const Problem& p, const Sources& sources, const SolveOperands& in,
           const SolveResults& out) {
  std::vector<int64_t> total(p.n_logical);
  std::vector<bool> negative(p.n_logical);
  int32_t status = 0;
  for (int32_t s = 0; s < sources.n_sources; ++s) {
    const int32_t* row = in.loads + static_cast<int64_t>(s) * sources.row;
    for (int32_t e = 0; e < p.n_logical; ++e) {
      if (row[e] < 0) negative[e] = true;
      total[e] += std::max(row[e], 0);
    }
    if (sources.row > p.n_logical && row[p.n_logical] != 0) status |= kInvalidIndex;
  }
  for (int32_t g = 0; g < p.n_groups; ++g) SolveGroup(p, in, total, negative, g, status, out);
}

namespace {

ffi::Error SolveImpl(int64_t ep_size, IntBuffer loads, IntBuffer phy2log, IntBuffer log2phy,
                     IntBuffer r2o, IntResult quota, IntResult max_load, IntResult lower_bound,
                     IntResult status) {
  const auto call =
      CheckSolve(ep_size, loads, phy2log, log2phy, r2o, quota, max_load, lower_bound, status);
  if (call.has_error()) return call.error();
  for (int64_t b = 0; b < call->batch; ++b) {
    Solve(call->problem, call->sources, BatchElement(call->problem, call->sources, call->in, b),
          BatchElement(call->problem, call->out, b));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SolveCpu, SolveImpl, SolveBinding());

}  // namespace lplb
