// The ranks' part of the interior point's iterate, and the system that gives their step: shared by
// all kinds of networks. The names are those of lplb_jax/reference/interior_point.py, which
// explains the method. Run by one team; thread r also handles rank r.
#ifndef LPLB_CUDA_IPM_RANKS_CUH_
#define LPLB_CUDA_IPM_RANKS_CUH_

#include "cuda/ipm/arithmetic.h"
#include "cuda/ipm/factor.cuh"

namespace lplb::cuda {

// Factor solves with the matrix: Table in factor.cuh, or a class with the same interface.
template <int kRanks, int kParts, template <int, int> typename Factor>
class RankIterate {
 public:
  using TableOf = Factor<kRanks, kParts>;
  static constexpr int kMostRanks = kRanks;
  static constexpr int kThreads = TableOf::kThreads;
  using TeamOf = Team<kThreads>;

  struct Memory {
    typename TableOf::Memory table;
    typename TeamOf::Memory team;
    // One entry per rank, 0 in idle places.
    alignas(16) float base[kRanks];
    alignas(16) float w[kRanks];
    alignas(16) float y[kRanks];
    alignas(16) float ex[kRanks];
    alignas(16) float q[kRanks];
    alignas(16) float k[kRanks];
    alignas(16) float p[kRanks];
    alignas(16) float middle[kRanks];
  };

 protected:
  __device__ RankIterate(int n_ranks, Memory& memory)
      : n_ranks_(n_ranks),
        is_rank_(threadIdx.x < n_ranks),
        memory_(memory),
        team_(memory.team),
        table_(memory.table) {}

  __device__ __forceinline__ void LoadRank() {
    base_ = is_rank_ ? memory_.base[threadIdx.x] : 0;
    w_ = is_rank_ ? memory_.w[threadIdx.x] : 0;
    inverse_w_ = is_rank_ ? Quotient(1, w_) : 0;
  }

  // Sets s, y and t for the first plan, whose loads are in load_. n_pairs is this thread's number
  // of products besides the ranks'. Returns mu.
  __device__ __forceinline__ float StartRanks(float n_pairs) {
    float most[1] = {fmaxf(load_ * inverse_w_, 0)};
    team_.template Reduce<1>(most);
    t_ = most[0] + kStartSlack;
    s_ = is_rank_ ? t_ * w_ - load_ : 1;
    float sum[2] = {is_rank_ ? Quotient(w_, s_) : 0, n_pairs};
    team_.template Reduce<0>(sum);
    const float mu = Quotient(1, sum[0]);
    inverse_pairs_ = Quotient(1, static_cast<float>(n_ranks_) + sum[1]);
    y_ = is_rank_ ? Quotient(mu, s_) : 1;
    if (is_rank_) memory_.y[threadIdx.x] = y_;
    TeamOf::Sync();
    return mu;
  }

  // Takes the best of the sets {ranks whose y is at least y_r}, if it beats the best cut so far.
  // The set of this thread's row keeps `stuck` and has weight `weight`. Returns whether the plan
  // behind load_ is the best so far.
  __device__ __forceinline__ bool KeepBest(bool first, float stuck, float weight) {
    const bool counts = table_.row() < n_ranks_;
    const uint2 best = team_.Best(counts ? fmaxf(Quotient(stuck, weight), 0) : 0, table_.row());
    float most[1] = {fmaxf(load_ * inverse_w_, 0)};
    team_.template Reduce<1>(most);
    const float value = __uint_as_float(best.x);
    if (first || value > bound_) {
      bound_ = value;
      in_cut_ = is_rank_ && y_ >= memory_.y[best.y];
    }
    const bool better = first || most[0] < largest_;
    if (better) largest_ = most[0];
    return better;
  }

  __device__ __forceinline__ bool Done(int n) const {
    return !(largest_ - bound_ > kStopGap * largest_) || n == kMaxSteps;
  }

  // Called before the network adds its part of the matrix and of the predictor's right-hand side. A
  // barrier must follow.
  __device__ __forceinline__ void BeginStep() {
    iy_ = Quotient(1, y_);
    ex_ = s_ * iy_;
    if (is_rank_) memory_.ex[threadIdx.x] = ex_;
  }

  // The predictor's right-hand side. `flow` is the flow into this thread's rank.
  __device__ __forceinline__ void SetRightSide(float flow) {
    rest_ = load_ - t_ * w_;
    if (is_rank_) memory_.q[threadIdx.x] = rest_ + flow;
  }

  // Factors the matrix from the off-diagonals in the table. Ends with a barrier.
  __device__ __forceinline__ void FactorMatrix() {
    table_.Factor(n_ranks_, memory_.ex[table_.row()]);
    table_.Solve(memory_.w, memory_.w, 0, memory_.middle, memory_.k);
    inverse_wk_ = Quotient(1, Dot(memory_.w, memory_.k));
    rt_ = 1 - Dot(memory_.w, memory_.y);
  }

  // Computes dy = p − r · k and dt from the right-hand side in memory.q. The right-hand side is
  // centred, and wᵀdy = rt.
  __device__ __forceinline__ float Saddle() {
    const float qm = Dot(memory_.k, memory_.q) * inverse_wk_;
    table_.Solve(memory_.q, memory_.w, qm, memory_.middle, memory_.p);
    r_ = (Dot(memory_.w, memory_.p) - rt_) * inverse_wk_;
    return qm + r_;
  }

  // dy_v − dy_u.
  __device__ __forceinline__ float Difference(int u, int v) const {
    return memory_.p[v] - memory_.p[u] - r_ * (memory_.k[v] - memory_.k[u]);
  }

  // The corrector's target for every product, and in `c` the weight of the predictor's second-order
  // terms. For this thread's part of the network, `value` holds the reciprocals of the limits and
  // the products v·v, d·v, d·d.
  __device__ __forceinline__ float Target(float (&value)[5], float& c) {
    second_ = 0;
    if (is_rank_) {
      const float dy = memory_.p[threadIdx.x] - r_ * memory_.k[threadIdx.x];
      const float a = dy * iy_;
      const float ds = -s_ * (1 + a);
      value[0] = fmaxf(value[0], 1 + a);
      value[1] = fmaxf(value[1], -a);
      value[2] += s_ * y_;
      value[3] += ds * y_;
      value[4] += ds * dy;
      second_ = ds * dy;
    }
    team_.template Reduce<2>(value);
    const float ap = value[0] > 1 ? Quotient(1, value[0]) : 1;
    const float ad = value[1] > 1 ? Quotient(1, value[1]) : 1;
    const float mu = value[2] * inverse_pairs_;
    const float reached =
        mu * (1 - ad) + ((ap - ad) * value[3] + ap * ad * value[4]) * inverse_pairs_;
    c = fminf(ap, ad);
    return TargetMu(mu, reached, c);
  }

  // The corrector's right-hand side. A barrier must follow.
  __device__ __forceinline__ void CorrectRightSide(float target, float c, float flow) {
    es_ = (target - c * second_) * iy_;
    if (is_rank_) memory_.q[threadIdx.x] = rest_ + es_ + flow;
  }

  // The corrector's step lengths, from the reciprocals of the limits in this thread's part of the
  // network.
  __device__ __forceinline__ void StepLengths(float (&limit)[2], float& ap, float& ad) {
    dy_ = 0;
    if (is_rank_) {
      dy_ = memory_.p[threadIdx.x] - r_ * memory_.k[threadIdx.x];
      limit[0] = fmaxf(limit[0], 1 + dy_ * iy_ - Quotient(es_, s_));
      limit[1] = fmaxf(limit[1], -dy_ * iy_);
    }
    team_.template Reduce<2>(limit);
    ap = limit[0] > kBackOff ? Quotient(kBackOff, limit[0]) : 1;
    ad = limit[1] > kBackOff ? Quotient(kBackOff, limit[1]) : 1;
  }

  // Ends with a barrier.
  __device__ __forceinline__ void MoveRanks(float ap, float ad, float dt) {
    if (is_rank_) {
      const float ds = es_ - s_ - ex_ * dy_;
      s_ = fmaxf(s_ + ap * ds, LeastSlack(w_));
      y_ = fmaxf(y_ + ad * dy_, kLeastDual);
      memory_.y[threadIdx.x] = y_;
    }
    t_ += ap * dt;
    TeamOf::Sync();
  }

  // Sum over the ranks, computed like Dot.
  static __device__ __forceinline__ float Sum(const float* a) {
    float sum[4] = {0, 0, 0, 0};
    if constexpr (kRanks <= 32) {
#pragma unroll
      for (int i = 0; i < kRanks / 4; ++i) {
        const float4 b = reinterpret_cast<const float4*>(a)[i];
        sum[0] += b.x;
        sum[1] += b.y;
        sum[2] += b.z;
        sum[3] += b.w;
      }
      return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    } else {
      float own[1] = {0};
#pragma unroll
      for (int i = 0; i < kRanks; i += 32) own[0] += a[i + (threadIdx.x & 31)];
      TeamOf::template SumUp<0>(own);
      return own[0];
    }
  }

  // aᵀb over the ranks, in every thread independently: for few ranks, adding is faster than
  // exchanging.
  static __device__ __forceinline__ float Dot(const float* a, const float* b) {
    if constexpr (kRanks <= 32) {
      float sum[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kRanks / 4; ++i) {
        const float4 c = reinterpret_cast<const float4*>(a)[i];
        const float4 d = reinterpret_cast<const float4*>(b)[i];
        sum[0] += c.x * d.x;
        sum[1] += c.y * d.y;
        sum[2] += c.z * d.z;
        sum[3] += c.w * d.w;
      }
      return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    } else {
      float sum[1] = {0};
#pragma unroll
      for (int i = 0; i < kRanks; i += 32) {
        sum[0] += a[i + (threadIdx.x & 31)] * b[i + (threadIdx.x & 31)];
      }
      TeamOf::template SumUp<0>(sum);
      return sum[0];
    }
  }

  const int n_ranks_;
  const bool is_rank_;
  Memory& memory_;
  TeamOf team_;
  TableOf table_;
  // This thread's rank, and t, which all threads know.
  float base_, w_, inverse_w_, load_, s_, y_, t_;
  // What all threads know of the best plan and cut, and whether this rank is in the cut.
  float largest_ = 0;
  float bound_ = 0;
  bool in_cut_ = true;

 private:
  float inverse_pairs_;
  float inverse_wk_, rt_;
  float r_;  // The multiple of k in dy.
  float iy_, ex_, rest_, second_, es_, dy_;
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_RANKS_CUH_
