// The interior point for one group. The names are those of lplb_jax/reference/interior_point.py,
// which explains the method.
#ifndef LPLB_XLA_FFI_CPU_INTERIOR_POINT_H_
#define LPLB_XLA_FFI_CPU_INTERIOR_POINT_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/ipm/arithmetic.h"

namespace lplb {

// How far a step may go before a variable is no longer positive.
struct StepLimits {
  float primal = kNoLimit;
  float dual = kNoLimit;

  static void Note(float& longest, float a, float da) {
    if (da < 0) longest = std::min(longest, -a / da);
  }
};

// Network is what moves between the ranks, with its part of the iterate; see networks.h.
template <typename Network>
class InteriorPoint {
 public:
  using Vector = std::vector<float>;

  InteriorPoint(Network& network, const Vector& weights)
      : n_(weights.size()), w_(weights), network_(network), cut_(n_) {}

  // Returns the best cut. The best plan stays in the network.
  std::vector<bool> Run() {
    Start();
    KeepBest();
    for (int32_t n = 0; n < kMaxSteps && largest_ - bound_ > kStopGap * largest_; ++n) {
      Step();
      KeepBest();
    }
    return cut_;
  }

 private:
  struct Direction {
    typename Network::Change moving;
    Vector s, y;
    float t;
  };

  void Start() {
    const Vector load = network_.Loads();
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
    network_.SetFirstDuals(y_, sum);
  }

  // Factors without subtraction, from off-diagonals o_ ≥ 0 and excesses. lower_ overwrites o_.
  void Factor() {
    o_.assign(n_ * n_, 0);
    Vector excess(n_);
    for (int32_t r = 0; r < n_; ++r) excess[r] = s_[r] / y_[r];
    network_.AddLaplacian(o_);
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

  // The direction to the targets of the products: the network's, and rs.
  Direction Solve(const Vector& rs) const {
    const Vector load = network_.Loads();
    Vector q(n_);
    float rt = 1;
    for (int32_t r = 0; r < n_; ++r) {
      rt -= w_[r] * y_[r];
      q[r] = rs[r] / y_[r] - (t_ * w_[r] - load[r] - s_[r]);
    }
    const Vector drive = network_.Drive(y_);
    network_.AddFlow(drive, q);
    // The right-hand side is centred: M⁻¹ is huge along k.
    float qm = 0;
    for (int32_t r = 0; r < n_; ++r) qm += k_[r] * q[r];
    for (int32_t r = 0; r < n_; ++r) q[r] -= qm * w_[r];
    SolveFactored(q);
    float excess = -rt;
    for (int32_t r = 0; r < n_; ++r) excess += w_[r] * q[r];
    for (int32_t r = 0; r < n_; ++r) q[r] -= excess * k_[r];

    Direction d = {network_.ChangeBy(drive, q), Vector(n_), q, qm + excess / wk_};
    for (int32_t r = 0; r < n_; ++r) d.s[r] = (rs[r] - s_[r] * d.y[r]) / y_[r];
    return d;
  }

  // The longest primal and dual steps, at most 1, that keep all variables positive.
  void Limits(const Direction& d, float back_off, float& ap, float& ad) const {
    StepLimits limits;
    network_.Limit(d.moving, limits);
    for (int32_t r = 0; r < n_; ++r) {
      StepLimits::Note(limits.primal, s_[r], d.s[r]);
      StepLimits::Note(limits.dual, y_[r], d.y[r]);
    }
    ap = std::min(back_off * limits.primal, 1.0f);
    ad = std::min(back_off * limits.dual, 1.0f);
  }

  void Step() {
    Vector rs(n_);
    float mu = 0;
    network_.BeginStep(mu);
    for (int32_t r = 0; r < n_; ++r) {
      rs[r] = -s_[r] * y_[r];
      mu -= rs[r];
    }
    const float n_pairs = static_cast<float>(n_ + network_.n_pairs());
    mu /= n_pairs;
    Factor();

    // Predictor: aims straight at the solution. How far it gets determines how much to centre.
    const Direction affine = Solve(rs);
    float ap, ad;
    Limits(affine, 1, ap, ad);
    float first = 0;
    float second = 0;
    network_.AddProducts(affine.moving, first, second);
    for (int32_t r = 0; r < n_; ++r) {
      first += affine.s[r] * y_[r];
      second += affine.s[r] * affine.y[r];
    }
    const float reached = mu * (1 - ad) + ((ap - ad) * first + ap * ad * second) / n_pairs;
    const float c = std::min(ap, ad);
    const float target = TargetMu(mu, reached, c);

    // Corrector: the same matrix, with the predictor's second-order terms.
    network_.Correct(target, c, affine.moving);
    for (int32_t r = 0; r < n_; ++r) rs[r] += target - c * affine.s[r] * affine.y[r];
    const Direction d = Solve(rs);
    Limits(d, kBackOff, ap, ad);
    network_.Move(d.moving, ap, ad);
    for (int32_t r = 0; r < n_; ++r) {
      s_[r] = std::max(s_[r] + ap * d.s[r], LeastSlack(w_[r]));
      y_[r] = std::max(y_[r] + ad * d.y[r], kLeastDual);
    }
    t_ += ap * d.t;
  }

  void KeepBest() {
    const Vector load = network_.LoadsOfPlan();
    float largest = 0;
    for (int32_t r = 0; r < n_; ++r) largest = std::max(largest, load[r] / w_[r]);
    if (largest < largest_) {
      largest_ = largest;
      network_.KeepPlan();
    }
    // Among the sets {ranks whose y is at least y_r}, the one that proves most.
    const auto stuck = network_.Stuck(y_);
    for (int32_t r = 0; r < n_; ++r) {
      float weight = 0;
      for (int32_t i = 0; i < n_; ++i) {
        if (y_[i] >= y_[r]) weight += w_[i];
      }
      const float bound = stuck(y_[r]) / weight;
      if (bound > bound_) {
        bound_ = bound;
        for (int32_t i = 0; i < n_; ++i) cut_[i] = y_[i] >= y_[r];
      }
    }
  }

  const int32_t n_;
  const Vector w_;
  Network& network_;
  Vector s_, y_;
  float t_ = 0;
  Vector o_, pivot_, k_;
  float wk_ = 0;
  float largest_ = kNoLimit;
  float bound_ = -kNoLimit;
  std::vector<bool> cut_;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_CPU_INTERIOR_POINT_H_
