// The interior point for one group, with the names of lplb_jax/reference/ipm.py, which explains it.
#ifndef LPLB_XLA_FFI_CPU_INTERIOR_POINT_H_
#define LPLB_XLA_FFI_CPU_INTERIOR_POINT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/ipm/arithmetic.h"

namespace lplb {

class InteriorPoint {
 public:
  using Vector = std::vector<float>;

  // Edge e leads from rank u[e] to rank v[e]; of capacity 0 where it is none.
  InteriorPoint(Vector base, Vector cap, Vector w, std::vector<int32_t> u, std::vector<int32_t> v)
      : n_(base.size()),
        base_(std::move(base)),
        w_(std::move(w)),
        all_cap_(std::move(cap)),
        u_(std::move(u)),
        v_(std::move(v)) {}

  // The best plan, its largest load / weight, the best cut, and its value in float32.
  struct Best {
    Vector moved;
    float largest;
    std::vector<bool> cut;
    float bound;
  };

  Best Run() {
    const float power =
        PowerOfTwo(Exponent(base_.empty() ? 0 : *std::max_element(base_.begin(), base_.end())));
    const float scale = Scale(1 / power);
    Start();
    best_ = {Vector(all_cap_.size()), kNoLimit, std::vector<bool>(n_), -kNoLimit};
    KeepBest();
    for (int32_t n = 0; n < kMaxSteps && best_.largest - best_.bound > kStopGap * best_.largest;
         ++n) {
      Step();
      KeepBest();
    }
    for (float& moved : best_.moved) moved = moved * scale * power;
    best_.largest = best_.largest * scale * power;
    best_.bound = best_.bound * scale * power;
    return best_;
  }

 private:
  struct Direction {
    Vector x, zl, zu, s, y;
    float t;
  };

  // Divides all loads by their scale, and leaves out the edges that can move next to nothing. A
  // power of two comes first, since the sum of all ranks' loads could overflow.
  float Scale(float power) {
    for (float& base : base_) base *= power;
    for (float& cap : all_cap_) cap *= power;
    Vector stuck = base_;
    float sum = 0;
    float weight = 0;
    for (size_t e = 0; e < all_cap_.size(); ++e) stuck[u_[e]] -= all_cap_[e];
    for (int32_t r = 0; r < n_; ++r) {
      sum += base_[r];
      weight += w_[r];
    }
    float scale = sum / weight;
    for (int32_t r = 0; r < n_; ++r) scale = std::max(scale, stuck[r] / w_[r]);
    const float unit = scale > 0 ? 1 / scale : 0;
    for (float& base : base_) base *= unit;
    for (size_t e = 0; e < all_cap_.size(); ++e) {
      if (all_cap_[e] * unit <= kLeastEdge * w_[u_[e]]) continue;
      edge_.push_back(e);
      cap_.push_back(all_cap_[e] * unit);
    }
    m_ = edge_.size();
    return scale;
  }

  float Difference(const Vector& y, int32_t i) const { return y[v_[edge_[i]]] - y[u_[edge_[i]]]; }

  void AddFlow(const Vector& flow, Vector& load) const {
    for (int32_t i = 0; i < m_; ++i) {
      load[u_[edge_[i]]] -= flow[i];
      load[v_[edge_[i]]] += flow[i];
    }
  }

  void Start() {
    x_.resize(m_);
    for (int32_t i = 0; i < m_; ++i) x_[i] = cap_[i] / 2;
    xb_ = x_;
    Vector load = base_;
    AddFlow(x_, load);
    t_ = 0;
    for (int32_t r = 0; r < n_; ++r) t_ = std::max(t_, load[r] / w_[r]);
    t_ += kStartSlack;
    s_.resize(n_);
    y_.resize(n_);
    float sum = 0;
    for (int32_t r = 0; r < n_; ++r) {
      s_[r] = t_ * w_[r] - load[r];
      sum += w_[r] / s_[r];
    }
    for (int32_t r = 0; r < n_; ++r) y_[r] = 1 / (sum * s_[r]);
    zl_.resize(m_);
    zu_.resize(m_);
    for (int32_t i = 0; i < m_; ++i) {
      const float m = kStartProduct / (sum * x_[i]);
      const float h = Difference(y_, i) / 2;
      const float larger = std::sqrt(m * m + h * h) + std::abs(h);
      const float smaller = m * m / larger;
      zl_[i] = h > 0 ? larger : smaller;
      zu_[i] = h > 0 ? smaller : larger;
    }
  }

  // Factor without subtraction: off-diagonals o_ ≥ 0 and excesses; lower_ comes in o_'s place.
  void Factor(const Vector& H) {
    o_.assign(n_ * n_, 0);
    Vector excess(n_);
    for (int32_t r = 0; r < n_; ++r) excess[r] = s_[r] / y_[r];
    for (int32_t i = 0; i < m_; ++i) {
      o_[u_[edge_[i]] * n_ + v_[edge_[i]]] += H[i];
      o_[v_[edge_[i]] * n_ + u_[edge_[i]]] += H[i];
    }
    pivot_.resize(n_);
    for (int32_t k = 0; k < n_; ++k) {
      float p = excess[k];
      for (int32_t j = k + 1; j < n_; ++j) p += o_[k * n_ + j];
      pivot_[k] = p;
      for (int32_t i = k + 1; i < n_; ++i) {
        const float l = o_[i * n_ + k] / p;
        o_[i * n_ + k] = l;
        if (l == 0) continue;
        for (int32_t j = k + 1; j < n_; ++j) o_[i * n_ + j] += l * o_[k * n_ + j];
        excess[i] += l * excess[k];
      }
    }
    k_ = w_;
    SolveFactored(k_);
    wk_ = 0;
    for (int32_t r = 0; r < n_; ++r) wk_ += w_[r] * k_[r];
    for (float& k : k_) k /= wk_;
  }

  void SolveFactored(Vector& q) const {
    for (int32_t i = 1; i < n_; ++i) {
      for (int32_t k = 0; k < i; ++k) q[i] += o_[i * n_ + k] * q[k];
    }
    for (int32_t k = 0; k < n_; ++k) q[k] /= pivot_[k];
    for (int32_t k = n_ - 1; k >= 0; --k) {
      for (int32_t i = k + 1; i < n_; ++i) q[k] += o_[i * n_ + k] * q[i];
    }
  }

  // The direction to the targets rl, ru, rs of the products.
  Direction Solve(const Vector& H, const Vector& rl, const Vector& ru, const Vector& rs) const {
    Vector g(m_), flow(m_), q(n_), load = base_;
    AddFlow(x_, load);
    float rt = 1;
    for (int32_t r = 0; r < n_; ++r) {
      rt -= w_[r] * y_[r];
      q[r] = rs[r] / y_[r] - (t_ * w_[r] - load[r] - s_[r]);
    }
    for (int32_t i = 0; i < m_; ++i) {
      const float rd = Difference(y_, i) - (zl_[i] - zu_[i]);
      g[i] = rl[i] / x_[i] - ru[i] / xb_[i] - rd;
      flow[i] = H[i] * g[i];
    }
    AddFlow(flow, q);
    // The right-hand side is centred: M⁻¹ is huge along k.
    float qm = 0;
    for (int32_t r = 0; r < n_; ++r) qm += k_[r] * q[r];
    for (int32_t r = 0; r < n_; ++r) q[r] -= qm * w_[r];
    SolveFactored(q);
    float excess = -rt;
    for (int32_t r = 0; r < n_; ++r) excess += w_[r] * q[r];
    for (int32_t r = 0; r < n_; ++r) q[r] -= excess * k_[r];

    Direction d = {Vector(m_), Vector(m_), Vector(m_), Vector(n_), q, qm + excess / wk_};
    for (int32_t i = 0; i < m_; ++i) {
      d.x[i] = H[i] * (g[i] - Difference(d.y, i));
      d.zl[i] = (rl[i] - zl_[i] * d.x[i]) / x_[i];
      d.zu[i] = (ru[i] + zu_[i] * d.x[i]) / xb_[i];
    }
    for (int32_t r = 0; r < n_; ++r) d.s[r] = (rs[r] - s_[r] * d.y[r]) / y_[r];
    return d;
  }

  // The longest primal and dual steps, at most 1, that keep everything positive.
  void Limits(const Direction& d, float back_off, float& ap, float& ad) const {
    float primal = kNoLimit;
    float dual = kNoLimit;
    const auto limit = [](float& longest, float a, float da) {
      if (da < 0) longest = std::min(longest, -a / da);
    };
    for (int32_t i = 0; i < m_; ++i) {
      limit(primal, x_[i], d.x[i]);
      limit(primal, xb_[i], -d.x[i]);
      limit(dual, zl_[i], d.zl[i]);
      limit(dual, zu_[i], d.zu[i]);
    }
    for (int32_t r = 0; r < n_; ++r) {
      limit(primal, s_[r], d.s[r]);
      limit(dual, y_[r], d.y[r]);
    }
    ap = std::min(back_off * primal, 1.0f);
    ad = std::min(back_off * dual, 1.0f);
  }

  void Step() {
    Vector H(m_), rl(m_), ru(m_), rs(n_);
    float mu = 0;
    for (int32_t i = 0; i < m_; ++i) {
      H[i] = 1 / (zl_[i] / x_[i] + zu_[i] / xb_[i]);
      rl[i] = -x_[i] * zl_[i];
      ru[i] = -xb_[i] * zu_[i];
      mu -= rl[i] + ru[i];
    }
    for (int32_t r = 0; r < n_; ++r) {
      rs[r] = -s_[r] * y_[r];
      mu -= rs[r];
    }
    const float n_pairs = static_cast<float>(n_ + 2 * m_);
    mu /= n_pairs;
    Factor(H);

    // Predictor: straight at the solution. How far it gets says how much to centre.
    const Direction affine = Solve(H, rl, ru, rs);
    float ap, ad;
    Limits(affine, 1, ap, ad);
    float first = 0;
    float second = 0;
    for (int32_t i = 0; i < m_; ++i) {
      first += affine.x[i] * (zl_[i] - zu_[i]);
      second += affine.x[i] * (affine.zl[i] - affine.zu[i]);
    }
    for (int32_t r = 0; r < n_; ++r) {
      first += affine.s[r] * y_[r];
      second += affine.s[r] * affine.y[r];
    }
    const float reached = mu * (1 - ad) + ((ap - ad) * first + ap * ad * second) / n_pairs;
    const float c = std::min(ap, ad);
    const float target = TargetMu(mu, reached, c);

    // Corrector: the same matrix, with the predictor's second-order terms.
    for (int32_t i = 0; i < m_; ++i) {
      rl[i] += target - c * affine.x[i] * affine.zl[i];
      ru[i] += target + c * affine.x[i] * affine.zu[i];
    }
    for (int32_t r = 0; r < n_; ++r) rs[r] += target - c * affine.s[r] * affine.y[r];
    const Direction d = Solve(H, rl, ru, rs);
    Limits(d, kBackOff, ap, ad);
    for (int32_t i = 0; i < m_; ++i) {
      const float least = LeastPrimal(cap_[i]);
      x_[i] = std::max(x_[i] + ap * d.x[i], least);
      xb_[i] = std::max(xb_[i] - ap * d.x[i], least);
      zl_[i] = std::max(zl_[i] + ad * d.zl[i], kLeastDual);
      zu_[i] = std::max(zu_[i] + ad * d.zu[i], kLeastDual);
    }
    for (int32_t r = 0; r < n_; ++r) {
      s_[r] = std::max(s_[r] + ap * d.s[r], LeastSlack(w_[r]));
      y_[r] = std::max(y_[r] + ad * d.y[r], kLeastDual);
    }
    t_ += ap * d.t;
  }

  void KeepBest() {
    Vector plan(m_), load = base_;
    // 0 where x is no number.
    for (int32_t i = 0; i < m_; ++i) plan[i] = std::min(std::max(0.0f, x_[i]), cap_[i]);
    AddFlow(plan, load);
    float largest = 0;
    for (int32_t r = 0; r < n_; ++r) largest = std::max(largest, load[r] / w_[r]);
    if (largest < best_.largest) {
      best_.largest = largest;
      for (int32_t i = 0; i < m_; ++i) best_.moved[edge_[i]] = plan[i];
    }
    // Of the sets {ranks whose y is at least y_r} the one that proves most.
    for (int32_t r = 0; r < n_; ++r) {
      float stuck = 0;
      float weight = 0;
      for (int32_t i = 0; i < n_; ++i) {
        if (y_[i] >= y_[r]) {
          stuck += base_[i];
          weight += w_[i];
        }
      }
      for (int32_t i = 0; i < m_; ++i) {
        if (y_[u_[edge_[i]]] >= y_[r] && y_[v_[edge_[i]]] < y_[r]) stuck -= cap_[i];
      }
      if (stuck / weight > best_.bound) {
        best_.bound = stuck / weight;
        for (int32_t i = 0; i < n_; ++i) best_.cut[i] = y_[i] >= y_[r];
      }
    }
  }

  int32_t n_;
  int32_t m_ = 0;
  Vector base_, w_, all_cap_, cap_;
  std::vector<int32_t> u_, v_, edge_;
  Vector x_, xb_, zl_, zu_, s_, y_;
  float t_ = 0;
  Vector o_, pivot_, k_;
  float wk_ = 0;
  Best best_;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_INTERIOR_POINT_H_
