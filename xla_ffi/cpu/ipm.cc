// ipm: the interior point, as lplb_jax/reference/ipm.py specifies it.
#include "xla_ffi/ipm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "xla_ffi/cpu/handler.h"
#include "xla_ffi/cpu/interior.h"
#include "xla_ffi/cpu/steps.h"
#include "xla_ffi/cpu/waves.h"

namespace lplb {
namespace {

// The ranks' loads and the edges' capacities of one group. The sums are of more range than Load, so
// that they show an overflow.
template <typename Load, typename Sum>
struct Group {
  std::vector<Load> own;  // [group_size, n_local]
  std::vector<Sum> base;
  std::vector<Sum> cap;
  Sum most = 0;  // What a rank could receive at most, with what it has.

  Group(const Problem& p, const Waves& waves, const int32_t* r2o, std::vector<Load> loads)
      : own(std::move(loads)), base(p.group_size), cap(p.group_size * p.n_columns) {
    for (int32_t r = 0; r < p.group_size; ++r) {
      for (int32_t k = 0; k < p.n_local; ++k) {
        base[r] += own[r * p.n_local + k];
        const int32_t edge = waves.Edge(r, k % p.n_columns);
        if (k < p.n_redundant && waves.dst()[edge] != r) cap[edge] += own[r * p.n_local + k];
      }
    }
    for (int32_t v = 0; v < p.group_size; ++v) {
      Sum sum = base[v];
      for (int32_t d = 0; d < p.n_columns; ++d) {
        sum += cap[waves.Edge(r2o[waves.Edge(v, d)], d)];
      }
      most = std::max(most, sum);
    }
  }
};

template <typename Load>
std::vector<float> ToFloat(const std::vector<Load>& values) {
  return std::vector<float>(values.begin(), values.end());
}

InteriorPoint::Best FindBest(const Problem& p, const Waves& waves, std::vector<float> base,
                             std::vector<float> cap, const std::vector<float>& weights) {
  std::vector<int32_t> u(cap.size());
  for (size_t e = 0; e < u.size(); ++e) u[e] = static_cast<int32_t>(e) / p.n_columns;
  return InteriorPoint(std::move(base), std::move(cap), weights, std::move(u), waves.dst()).Run();
}

// What cannot leave the cut, and the cut's weight and size.
struct Cut {
  int64_t stuck = 0;
  float weight = 0;
  int64_t size = 0;

  template <typename Sum>
  Cut(const Problem& p, const Waves& waves, const std::vector<bool>& inside,
      const std::vector<Sum>& base, const std::vector<Sum>& cap,
      const std::vector<float>& weights) {
    for (int32_t r = 0; r < p.group_size; ++r) {
      if (!inside[r]) continue;
      stuck += base[r];
      weight += weights[r];
      ++size;
      for (int32_t d = 0; d < p.n_columns; ++d) {
        const int32_t edge = waves.Edge(r, d);
        if (!inside[waves.dst()[edge]]) stuck -= cap[edge];
      }
    }
  }
};

void Put(const IpmOptions& options, float value, int32_t* out) {
  if (options.float_loads_out()) {
    *reinterpret_cast<float*>(out) = value;
  } else {
    *out = static_cast<int32_t>(value);
  }
}

float LargestShare(const std::vector<int32_t>& load, const std::vector<float>& weights) {
  float largest = 0;
  for (size_t r = 0; r < load.size(); ++r) {
    largest = std::max(largest, static_cast<float>(load[r]) / weights[r]);
  }
  return largest;
}

// Integer loads; returns status bits.
int32_t SolveGroup(const Problem& p, const IpmOptions& options, const int32_t* r2o,
                   std::vector<int32_t> own, bool overflow, const std::vector<float>& weights,
                   int32_t* quota, int32_t* max_load, int32_t* lower_bound) {
  Waves waves(p.group_size, p.n_columns, r2o);
  const Group<int32_t, int64_t> group(p, waves, r2o, std::move(own));
  std::vector<int32_t> moved(group.cap.size());
  if (overflow || group.most > kInt32Max) {
    WriteQuotas(p, waves, group.own, moved, quota);
    *max_load = kInt32Max;
    if (options.weighted) *reinterpret_cast<float*>(max_load) = static_cast<float>(kInt32Max);
    Put(options, 0, lower_bound);
    return kLoadOverflow;
  }
  const std::vector<int32_t> base(group.base.begin(), group.base.end());
  const std::vector<int32_t> cap(group.cap.begin(), group.cap.end());
  const auto best = FindBest(p, waves, ToFloat(base), ToFloat(cap), weights);
  bool converged = best.largest - best.bound <= kConvergedGap * best.largest;
  const Cut cut(p, waves, best.cut, base, cap, weights);

  std::vector<int32_t> load = base;
  for (int32_t e = 0; e < static_cast<int32_t>(cap.size()); ++e) {
    moved[e] = RoundTokens(best.moved[e], cap[e]);
    load[e / p.n_columns] -= moved[e];
    load[waves.dst()[e]] += moved[e];
  }
  if (options.weighted) {
    if (options.repair) {
      // Where the plan at hand is best ⌈t·w_r⌉ tokens are enough for every rank r.
      std::vector<int32_t> enough(load.size());
      for (size_t r = 0; r < load.size(); ++r) {
        enough[r] = EnoughTokens(best.largest, weights[r]);
        load[r] -= enough[r];
      }
      waves.Run(load, cap, moved, 0);
      for (size_t r = 0; r < load.size(); ++r) load[r] += enough[r];
    }
    const float largest = LargestShare(load, weights);
    Put(options, largest, max_load);
    Put(options, std::min(largest, Provable(cut.stuck, 0, cut.weight, p.group_size)), lower_bound);
  } else {
    int64_t bound = waves.FirstTarget(base, cap);
    if (cut.stuck > 0) bound = std::max(bound, CeilDiv(cut.stuck, cut.size));
    *lower_bound = static_cast<int32_t>(bound);
    if (options.repair) {
      *lower_bound = waves.Run(load, cap, moved, *lower_bound);
      converged = true;
    }
    *max_load = *std::max_element(load.begin(), load.end());
  }
  WriteQuotas(p, waves, group.own, moved, quota);
  return converged ? 0 : kNotConverged;
}

// Real loads; returns status bits.
int32_t SolveGroup(const Problem& p, const IpmOptions& options, const int32_t* r2o,
                   std::vector<float> own, bool, const std::vector<float>& weights, float* quota,
                   int32_t* max_load, int32_t* lower_bound) {
  Waves waves(p.group_size, p.n_columns, r2o);
  const Group<float, float> group(p, waves, r2o, std::move(own));
  std::vector<float> moved(group.cap.size());
  if (!(group.most < std::numeric_limits<float>::infinity())) {
    WriteQuotas(p, waves, group.own, moved, quota);
    Put(options, std::numeric_limits<float>::infinity(), max_load);
    Put(options, 0, lower_bound);
    return kLoadOverflow;
  }
  auto best = FindBest(p, waves, group.base, group.cap, weights);
  WriteQuotas(p, waves, group.own, best.moved, quota);
  float largest = 0;
  for (int32_t r = 0; r < p.group_size; ++r) {
    float load = 0;
    for (int32_t k = 0; k < p.slots_per_rank; ++k) load += quota[r * p.slots_per_rank + k];
    largest = std::max(largest, load / weights[r]);
  }

  // For the proof, loads in units of a power of two that are rounded the safe way.
  const int32_t exponent = UnitExponent(group.most);
  std::vector<int64_t> base(p.group_size);
  std::vector<int64_t> cap(group.cap.size());
  for (int32_t r = 0; r < p.group_size; ++r) {
    for (int32_t k = 0; k < p.n_local; ++k) {
      const float units = std::ldexp(group.own[r * p.n_local + k], exponent);
      base[r] += static_cast<int64_t>(std::floor(units));
      const int32_t edge = waves.Edge(r, k % p.n_columns);
      if (k < p.n_redundant && waves.dst()[edge] != r) {
        cap[edge] += static_cast<int64_t>(std::ceil(units));
      }
    }
  }
  const Cut cut(p, waves, best.cut, base, cap, weights);
  const float bound = std::min(largest, Provable(cut.stuck, -exponent, cut.weight, p.group_size));
  Put(options, largest, max_load);
  Put(options, bound, lower_bound);
  return largest - bound <= kConvergedGap * largest ? 0 : kNotConverged;
}

// Rank weights with mean 1; all equal where one is no speed, which is a failure.
std::vector<float> Normalised(const Problem& p, const IpmOptions& options, const float* weights,
                              int32_t& status) {
  std::vector<float> result(weights, weights + p.group_size);
  float sum = 0;
  for (float weight : result) {
    if (!(weight > 0) || std::isinf(weight)) status |= kNotConverged;
    sum += weight;
  }
  const float mean = sum / static_cast<float>(p.group_size);
  for (float& weight : result) {
    weight = options.weighted && !(status & kNotConverged) ? weight / mean : 1;
  }
  return result;
}

template <typename Load, typename Sum>
void SolveOne(const Problem& p, const Sources& sources, const IpmOptions& options,
              const IpmOperands& in, const SolveResults& out) {
  const Load* loads = reinterpret_cast<const Load*>(in.solve.loads);
  std::vector<Sum> total(p.n_logical);
  std::vector<bool> negative(p.n_logical);
  int32_t shared_status = 0;
  for (int32_t s = 0; s < sources.n_sources; ++s) {
    const Load* row = loads + static_cast<int64_t>(s) * sources.row;
    for (int32_t e = 0; e < p.n_logical; ++e) {
      if (row[e] >= 0) {
        total[e] += row[e];
      } else {
        negative[e] = true;  // NaN, too.
      }
    }
    if (sources.row > p.n_logical && row[p.n_logical] != 0) shared_status |= kInvalidIndex;
  }
  const std::vector<float> weights = Normalised(p, options, in.weights, shared_status);

  const int32_t slots = p.slots_per_rank;
  constexpr bool kInteger = std::is_integral_v<Load>;
  for (int32_t g = 0; g < p.n_groups; ++g) {
    const int64_t first_slot = static_cast<int64_t>(g) * p.group_size * slots;
    int32_t status = shared_status;
    bool overflow = false;
    std::vector<Load> own;
    for (int32_t r = 0; r < p.group_size; ++r) {
      for (int32_t k = 0; k < p.n_local; ++k) {
        const int32_t expert =
            std::clamp(in.solve.phy2log[first_slot + r * slots + k], 0, p.n_logical - 1);
        Sum load = total[expert];
        if (kInteger && load > static_cast<Sum>(kInt32Max)) {
          overflow = true;
          load = static_cast<Sum>(kInt32Max);
        }
        if (negative[expert]) status |= kNegativeLoad;
        own.push_back(static_cast<Load>(load));
      }
    }
    Load* quota = reinterpret_cast<Load*>(out.quota) + first_slot;
    status |= SolveGroup(p, options, in.solve.r2o, std::move(own), overflow, weights, quota,
                         &out.max_load[g], &out.lower_bound[g]);
    if (Misplaced(p, in.solve, g)) status |= kBadPlacement;
    out.status[g] = status;
  }
}

ffi::Error RunIpm(const IpmCall& call) {
  if (call.options.cusolverdx) return Invalid("factor: cuSolverDx is for GPUs");
  LPLB_RETURN_IF_ERROR(CheckTopology(call.problem, call.batch, call.in.solve.r2o));
  const auto solve = call.options.floats ? SolveOne<float, float> : SolveOne<int32_t, int64_t>;
  for (int64_t b = 0; b < call.batch; ++b) {
    solve(call.problem, call.sources, call.options,
          BatchElement(call.problem, call.sources, call.in, b),
          BatchElement(call.problem, call.out, b));
  }
  return ffi::Error::Success();
}

const Register ipm({"lplb_ipm", CpuHandler<IpmCall, RunIpm>});

}  // namespace
}  // namespace lplb
