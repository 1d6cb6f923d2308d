// What the interior point moves, along a topology's edges or between an expert's hosts:
// lplb_jax/reference/networks.py explains it. A network holds its part of the iterate and of a
// step. Its loads are scaled so that the largest load / weight is about 1.
#ifndef LPLB_XLA_FFI_CPU_NETWORKS_H_
#define LPLB_XLA_FFI_CPU_NETWORKS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/ipm/arithmetic.h"
#include "xla_ffi/cpu/graph.h"
#include "xla_ffi/cpu/interior_point.h"

namespace lplb {

// Along an edge, x moves and xb = cap − x stays.
class EdgeNetwork {
 public:
  using Vector = std::vector<float>;

  struct Change {
    Vector x, zl, zu;
  };

  // Edge e leads from rank u[e] to rank v[e]. Capacity 0 means that there is no edge.
  EdgeNetwork(Vector base, Vector cap, const Vector& w, std::vector<int32_t> u,
              std::vector<int32_t> v)
      : n_(base.size()),
        base_(std::move(base)),
        all_cap_(std::move(cap)),
        u_(std::move(u)),
        v_(std::move(v)),
        best_(all_cap_.size()) {
    Scale(w);
    x_.resize(m_);
    for (int32_t i = 0; i < m_; ++i) x_[i] = cap_[i] / 2;
    xb_ = x_;
    zl_.resize(m_);
    zu_.resize(m_);
  }

  int32_t n_pairs() const { return 2 * m_; }

  // What the best plan moves along every edge.
  Vector Moved() const {
    Vector moved = best_;
    for (float& edge : moved) edge = edge * scale_ * power_;
    return moved;
  }

  Vector Loads() const { return LoadsOf(x_); }

  Vector LoadsOfPlan() {
    plan_.resize(m_);
    // Gives 0 if x is NaN.
    for (int32_t i = 0; i < m_; ++i) plan_[i] = std::min(std::max(0.0f, x_[i]), cap_[i]);
    return LoadsOf(plan_);
  }

  void KeepPlan() {
    for (int32_t i = 0; i < m_; ++i) best_[edge_[i]] = plan_[i];
  }

  // Returns a function of `least`: the load that cannot leave the ranks with y ≥ least.
  auto Stuck(const Vector& y) const {
    return [this, &y](float least) {
      float stuck = 0;
      for (int32_t i = 0; i < n_; ++i) {
        if (y[i] >= least) stuck += base_[i];
      }
      for (int32_t i = 0; i < m_; ++i) {
        if (y[u_[edge_[i]]] >= least && y[v_[edge_[i]]] < least) stuck -= cap_[i];
      }
      return stuck;
    };
  }

  void SetFirstDuals(const Vector& y, float sum) {
    for (int32_t i = 0; i < m_; ++i) {
      const float m = kStartProduct / (sum * x_[i]);
      const float h = Difference(y, i) / 2;
      const float larger = std::sqrt(m * m + h * h) + std::abs(h);
      const float smaller = m * m / larger;
      zl_[i] = h > 0 ? larger : smaller;
      zu_[i] = h > 0 ? smaller : larger;
    }
  }

  // Computes the conductances and the predictor's targets. Adds the products to mu.
  void BeginStep(float& mu) {
    for (Vector* a : {&H_, &rl_, &ru_}) a->resize(m_);
    for (int32_t i = 0; i < m_; ++i) {
      H_[i] = 1 / (zl_[i] / x_[i] + zu_[i] / xb_[i]);
      rl_[i] = -x_[i] * zl_[i];
      ru_[i] = -xb_[i] * zu_[i];
      mu -= rl_[i] + ru_[i];
    }
  }

  void AddLaplacian(Vector& o) const {
    for (int32_t i = 0; i < m_; ++i) {
      o[u_[edge_[i]] * n_ + v_[edge_[i]]] += H_[i];
      o[v_[edge_[i]] * n_ + u_[edge_[i]]] += H_[i];
    }
  }

  Vector Drive(const Vector& y) const {
    Vector g(m_);
    for (int32_t i = 0; i < m_; ++i) {
      const float rd = Difference(y, i) - (zl_[i] - zu_[i]);
      g[i] = rl_[i] / x_[i] - ru_[i] / xb_[i] - rd;
    }
    return g;
  }

  void AddFlow(const Vector& g, Vector& q) const {
    Vector flow(m_);
    for (int32_t i = 0; i < m_; ++i) flow[i] = H_[i] * g[i];
    AddTo(q, flow);
  }

  Change ChangeBy(const Vector& g, const Vector& dy) const {
    Change d = {Vector(m_), Vector(m_), Vector(m_)};
    for (int32_t i = 0; i < m_; ++i) {
      d.x[i] = H_[i] * (g[i] - Difference(dy, i));
      d.zl[i] = (rl_[i] - zl_[i] * d.x[i]) / x_[i];
      d.zu[i] = (ru_[i] + zu_[i] * d.x[i]) / xb_[i];
    }
    return d;
  }

  void Limit(const Change& d, StepLimits& limits) const {
    for (int32_t i = 0; i < m_; ++i) {
      StepLimits::Note(limits.primal, x_[i], d.x[i]);
      StepLimits::Note(limits.primal, xb_[i], -d.x[i]);
      StepLimits::Note(limits.dual, zl_[i], d.zl[i]);
      StepLimits::Note(limits.dual, zu_[i], d.zu[i]);
    }
  }

  void AddProducts(const Change& d, float& first, float& second) const {
    for (int32_t i = 0; i < m_; ++i) {
      first += d.x[i] * (zl_[i] - zu_[i]);
      second += d.x[i] * (d.zl[i] - d.zu[i]);
    }
  }

  // Adds the corrector's targets.
  void Correct(float target, float c, const Change& affine) {
    for (int32_t i = 0; i < m_; ++i) {
      rl_[i] += target - c * affine.x[i] * affine.zl[i];
      ru_[i] += target + c * affine.x[i] * affine.zu[i];
    }
  }

  void Move(const Change& d, float ap, float ad) {
    for (int32_t i = 0; i < m_; ++i) {
      const float least = LeastPrimal(cap_[i]);
      x_[i] = std::max(x_[i] + ap * d.x[i], least);
      xb_[i] = std::max(xb_[i] - ap * d.x[i], least);
      zl_[i] = std::max(zl_[i] + ad * d.zl[i], kLeastDual);
      zu_[i] = std::max(zu_[i] + ad * d.zu[i], kLeastDual);
    }
  }

 private:
  // Divides all loads by their scale, and leaves out edges that can move next to nothing. Scales by
  // a power of two first, since the sum of all ranks' loads could overflow.
  void Scale(const Vector& w) {
    power_ =
        PowerOfTwo(Exponent(base_.empty() ? 0 : *std::max_element(base_.begin(), base_.end())));
    for (float& base : base_) base *= 1 / power_;
    for (float& cap : all_cap_) cap *= 1 / power_;
    Vector stuck = base_;
    float sum = 0;
    float weight = 0;
    for (size_t e = 0; e < all_cap_.size(); ++e) stuck[u_[e]] -= all_cap_[e];
    for (int32_t r = 0; r < n_; ++r) {
      sum += base_[r];
      weight += w[r];
    }
    scale_ = sum / weight;
    for (int32_t r = 0; r < n_; ++r) scale_ = std::max(scale_, stuck[r] / w[r]);
    const float unit = scale_ > 0 ? 1 / scale_ : 0;
    for (float& base : base_) base *= unit;
    for (size_t e = 0; e < all_cap_.size(); ++e) {
      if (all_cap_[e] * unit <= kLeastEdge * w[u_[e]]) continue;
      edge_.push_back(e);
      cap_.push_back(all_cap_[e] * unit);
    }
    m_ = edge_.size();
  }

  float Difference(const Vector& y, int32_t i) const { return y[v_[edge_[i]]] - y[u_[edge_[i]]]; }

  void AddTo(Vector& load, const Vector& flow) const {
    for (int32_t i = 0; i < m_; ++i) {
      load[u_[edge_[i]]] -= flow[i];
      load[v_[edge_[i]]] += flow[i];
    }
  }

  Vector LoadsOf(const Vector& flow) const {
    Vector load = base_;
    AddTo(load, flow);
    return load;
  }

  int32_t n_;
  int32_t m_ = 0;
  float power_ = 1;
  float scale_ = 0;
  Vector base_, all_cap_, cap_;
  std::vector<int32_t> u_, v_, edge_;
  Vector best_, plan_;
  Vector x_, xb_, zl_, zu_;
  Vector H_, rl_, ru_;
};

// Experts and their hosts. For each expert, differences are taken relative to the host with the
// largest conductance. That host's flow is what balances the flows of the others.
class HostNetwork {
 public:
  using Vector = std::vector<float>;

  struct Change {
    Vector x, z;
  };

  HostNetwork(const ReplicaGraph& graph, Vector total, const Vector& w)
      : graph_(graph), n_(w.size()), total_(std::move(total)), best_(graph.rank.size()) {
    Scale(w);
    fixed_.resize(n_);
    for (int32_t e = 0; e < graph.n_logical; ++e) {
      const int32_t n_hosts = graph.Hosts(e);
      if (n_hosts == 0) continue;
      int32_t fastest = graph.first[e];
      for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
        if (w[graph.rank[c]] > w[graph.rank[fastest]]) fastest = c;
      }
      if (n_hosts == 1 || total_[e] <= kLeastEdge * w[graph.rank[fastest]]) {
        best_[fastest] = 1;
        fixed_[graph.rank[fastest]] += total_[e];
        continue;
      }
      const int32_t begin = static_cast<int32_t>(cell_.size());
      for (int32_t c = graph.first[e]; c < graph.first[e + 1]; ++c) {
        cell_.push_back(c);
        rank_.push_back(graph.rank[c]);
        x_.push_back(total_[e] / static_cast<float>(n_hosts));
      }
      expert_.push_back({begin, begin + n_hosts, begin, total_[e], 0});
    }
    z_.resize(x_.size());
  }

  int32_t n_pairs() const { return static_cast<int32_t>(x_.size()); }

  // The share of its expert's load that each cell has in the best plan.
  const Vector& Shares() const { return best_; }

  Vector Loads() const { return LoadsOf(x_); }

  Vector LoadsOfPlan() {
    share_.resize(x_.size());
    Vector plan(x_.size());
    for (const Expert& e : expert_) {
      float sum = 0;
      for (int32_t i = e.begin; i < e.end; ++i) sum += std::max(0.0f, x_[i]);
      // Equal shares if x is NaN or infinite.
      const bool good = sum > 0 && sum < kNoLimit;
      const float equal = 1 / static_cast<float>(e.end - e.begin);
      for (int32_t i = e.begin; i < e.end; ++i) {
        share_[i] = good ? std::max(0.0f, x_[i]) / sum : equal;
        plan[i] = share_[i] * e.total;
      }
    }
    return LoadsOf(plan);
  }

  void KeepPlan() {
    for (size_t i = 0; i < share_.size(); ++i) best_[cell_[i]] = share_[i];
  }

  // Returns a function of `least`: the load that cannot leave the ranks with y ≥ least.
  auto Stuck(const Vector& y) const {
    Vector least_of_hosts(graph_.n_logical, -1);
    for (int32_t e = 0; e < graph_.n_logical; ++e) {
      if (graph_.Hosts(e) == 0) continue;
      float least = y[graph_.rank[graph_.first[e]]];
      for (int32_t c = graph_.first[e]; c < graph_.first[e + 1]; ++c) {
        least = std::min(least, y[graph_.rank[c]]);
      }
      least_of_hosts[e] = least;
    }
    return [this, least_of_hosts](float least) {
      float stuck = 0;
      for (int32_t e = 0; e < graph_.n_logical; ++e) {
        if (least_of_hosts[e] >= least) stuck += total_[e];
      }
      return stuck;
    };
  }

  // Sets z to kStartProduct / (sum · x), plus the excess of y over the least y of the expert's
  // hosts.
  void SetFirstDuals(const Vector& y, float sum) {
    for (const Expert& e : expert_) {
      float least = y[rank_[e.begin]];
      for (int32_t i = e.begin; i < e.end; ++i) least = std::min(least, y[rank_[i]]);
      for (int32_t i = e.begin; i < e.end; ++i) {
        z_[i] = y[rank_[i]] - least + kStartProduct / (sum * x_[i]);
      }
    }
  }

  // Computes the conductances and the predictor's targets. Adds the products to mu.
  void BeginStep(float& mu) {
    h_.resize(x_.size());
    lack_.resize(x_.size());
    for (Expert& e : expert_) {
      e.main = e.begin;
      e.sum = 0;
      for (int32_t i = e.begin; i < e.end; ++i) {
        h_[i] = x_[i] / z_[i];
        lack_[i] = -x_[i] * z_[i];
        mu -= lack_[i];
        e.sum += h_[i];
        if (h_[i] > h_[e.main]) e.main = i;
      }
    }
  }

  void AddLaplacian(Vector& o) const {
    for (const Expert& e : expert_) {
      for (int32_t i = e.begin; i < e.end; ++i) {
        const float weight = h_[i] / e.sum;
        for (int32_t j = e.begin; j < i; ++j) {
          o[rank_[i] * n_ + rank_[j]] += weight * h_[j];
          o[rank_[j] * n_ + rank_[i]] += weight * h_[j];
        }
      }
    }
  }

  Vector Drive(const Vector& y) const {
    Vector g(x_.size());
    for (const Expert& e : expert_) {
      for (int32_t i = e.begin; i < e.end; ++i) {
        const float rd = y[rank_[i]] - y[rank_[e.main]] - (z_[i] - z_[e.main]);
        g[i] = lack_[i] / x_[i] - lack_[e.main] / x_[e.main] - rd;
      }
    }
    return g;
  }

  void AddFlow(const Vector& g, Vector& q) const {
    const Vector flow = Flow(g);
    for (size_t i = 0; i < flow.size(); ++i) q[rank_[i]] += flow[i];
  }

  Change ChangeBy(const Vector& g, const Vector& dy) const {
    Vector driven = g;
    for (const Expert& e : expert_) {
      for (int32_t i = e.begin; i < e.end; ++i) driven[i] -= dy[rank_[i]] - dy[rank_[e.main]];
    }
    Change d = {Flow(driven), Vector(x_.size())};
    for (size_t i = 0; i < x_.size(); ++i) d.z[i] = (lack_[i] - z_[i] * d.x[i]) / x_[i];
    return d;
  }

  void Limit(const Change& d, StepLimits& limits) const {
    for (size_t i = 0; i < x_.size(); ++i) {
      StepLimits::Note(limits.primal, x_[i], d.x[i]);
      StepLimits::Note(limits.dual, z_[i], d.z[i]);
    }
  }

  void AddProducts(const Change& d, float& first, float& second) const {
    for (size_t i = 0; i < x_.size(); ++i) {
      first += d.x[i] * z_[i];
      second += d.x[i] * d.z[i];
    }
  }

  // Adds the corrector's targets.
  void Correct(float target, float c, const Change& affine) {
    for (size_t i = 0; i < x_.size(); ++i) lack_[i] += target - c * affine.x[i] * affine.z[i];
  }

  void Move(const Change& d, float ap, float ad) {
    for (const Expert& e : expert_) {
      const float least = LeastPrimal(e.total);
      for (int32_t i = e.begin; i < e.end; ++i) {
        x_[i] = std::max(x_[i] + ap * d.x[i], least);
        z_[i] = std::max(z_[i] + ad * d.z[i], kLeastDual);
      }
    }
  }

 private:
  // An expert with tokens to divide. Its cells are begin … end − 1 of the cells that count.
  struct Expert {
    int32_t begin;
    int32_t end;
    int32_t main;  // The cell with the largest conductance.
    float total;
    float sum;  // The sum of the conductances.
  };

  // Divides all loads by their scale. Scales by a power of two first, since their sum could
  // overflow.
  void Scale(const Vector& w) {
    const float largest = *std::max_element(total_.begin(), total_.end());
    for (float& total : total_) total *= PowerOfTwo(-Exponent(largest));
    Vector stays(n_);
    float sum = 0;
    float weight = 0;
    for (int32_t e = 0; e < graph_.n_logical; ++e) {
      sum += total_[e];
      if (graph_.Hosts(e) == 1) stays[graph_.rank[graph_.first[e]]] += total_[e];
    }
    for (int32_t r = 0; r < n_; ++r) weight += w[r];
    float scale = sum / weight;
    for (int32_t r = 0; r < n_; ++r) scale = std::max(scale, stays[r] / w[r]);
    for (float& total : total_) total *= scale > 0 ? 1 / scale : 0;
  }

  Vector LoadsOf(const Vector& x) const {
    Vector load = fixed_;
    for (size_t i = 0; i < x.size(); ++i) load[rank_[i]] += x[i];
    return load;
  }

  // The flow that this gradient drives. It sums to zero over an expert's hosts.
  Vector Flow(const Vector& g) const {
    Vector flow(x_.size());
    for (const Expert& e : expert_) {
      float mean = 0;
      for (int32_t i = e.begin; i < e.end; ++i) mean += h_[i] / e.sum * g[i];
      float others = 0;
      for (int32_t i = e.begin; i < e.end; ++i) {
        if (i == e.main) continue;
        flow[i] = h_[i] * (g[i] - mean);
        others += flow[i];
      }
      flow[e.main] = -others;
    }
    return flow;
  }

  const ReplicaGraph& graph_;
  int32_t n_;
  Vector total_;  // [n_logical], 0 for experts without a host
  Vector fixed_;  // [n_ranks], loads of experts that have nothing to divide
  Vector best_;   // [n_cells of the graph]
  std::vector<Expert> expert_;
  std::vector<int32_t> cell_, rank_;
  Vector share_, x_, z_, h_, lack_;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_NETWORKS_H_
