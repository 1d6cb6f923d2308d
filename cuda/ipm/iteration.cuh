// The interior point along a topology, for one group and by one team. The edges are dealt out to
// all threads in turn.
#ifndef LPLB_CUDA_IPM_ITERATION_CUH_
#define LPLB_CUDA_IPM_ITERATION_CUH_

#include "cuda/ipm/ranks.cuh"

namespace lplb::cuda {

// The group's graph in shared memory. Edge e = u · n_columns + d leads from rank u to dst[e] and is
// column d of rank dst[e], that is, src[dst[e] · n_columns + d] = u.
struct Graph {
  int32_t n_ranks;
  int32_t n_columns;
  Divisor by_columns;
  const int32_t* src;
  const int32_t* dst;
};

// The number of edges, padded so that the threads of a row can take four at a time.
LPLB_HOST_DEVICE int64_t PaddedEdges(int64_t n_edges) { return (n_edges + 15) / 16 * 16; }

// kEdges is the most edges per thread. For Factor see RankIterate.
template <int kRanks, int kParts, int kEdges, template <int, int> typename Factor = Table>
class InteriorPoint : RankIterate<kRanks, kParts, Factor> {
  using Base = RankIterate<kRanks, kParts, Factor>;

 public:
  using Base::kMostRanks;
  using Base::kThreads;
  using typename Base::Memory;
  using typename Base::TableOf;
  using typename Base::TeamOf;

  // Per edge: the capacity, which the best plan replaces once it is read; the flow; H; and `ends`,
  // the values of y at both ends with the capacity, which is 0 in padding. Per rank: whether it is
  // in the best cut.
  struct GroupArrays {
    float* cap;
    float* flow;
    float* H;
    float4* ends;
    int32_t* cut;
  };

  __device__ InteriorPoint(const Graph& graph, Memory& memory, const GroupArrays& edges)
      : Base(graph.n_ranks, memory),
        graph_(graph),
        edges_(edges),
        n_edges_(graph.n_ranks * graph.n_columns) {}

  // Inputs: memory.base, memory.w and edges.cap, which is 0 where there is no edge. A barrier must
  // come before. The sum of base must be a finite float. Outputs: edges.flow, the best plan times
  // `back`, and edges.cut, the best cut. Ends with a barrier of the team.
  __device__ void Run(float back) {
    const float scale = Scale();
    Start();
    for (int n = 0;; ++n) {
      const bool better = UpdateBest(n == 0);
      if (better) ForEdges([&](int i, int e) { edges_.cap[e] = Plan(i); });
      if (this->Done(n)) break;
      Step();
    }
    TeamOf::Sync();
    ForEdges([&](int, int e) { edges_.flow[e] = edges_.cap[e] * scale * back; });
    if (is_rank_) edges_.cut[threadIdx.x] = in_cut_;
    TeamOf::Sync();
  }

 private:
  using Base::base_;
  using Base::in_cut_;
  using Base::inverse_w_;
  using Base::is_rank_;
  using Base::load_;
  using Base::memory_;
  using Base::table_;
  using Base::team_;
  using Base::w_;

  template <typename Function>
  __device__ __forceinline__ void ForEdges(Function&& function) const {
#pragma unroll
    for (int i = 0; i < kEdges; ++i) {
      const int e = threadIdx.x + i * kThreads;
      if (e < n_edges_) function(i, e);
    }
  }

  // The flow into a rank minus the flow out of it.
  __device__ __forceinline__ float Gather(const float* flow) const {
    float sum = 0;
#pragma unroll 2
    for (int d = 0; d < graph_.n_columns; ++d) {
      const int at = threadIdx.x * graph_.n_columns + d;
      sum += flow[graph_.src[at] * graph_.n_columns + d] - flow[at];
    }
    return sum;
  }

  __device__ __forceinline__ bool Live(int i) const { return cap_[i] > 0; }
  __device__ __forceinline__ int U(int i) const { return uv_[i] >> 16; }
  __device__ __forceinline__ int V(int i) const { return uv_[i] & 0xffff; }

  __device__ __forceinline__ float Plan(int i) const { return fminf(fmaxf(x_[i], 0), cap_[i]); }

  // Divides all loads by their scale, and leaves out edges that can move next to nothing.
  __device__ float Scale() {
    this->LoadRank();
    float stuck = base_;
    if (is_rank_) {
      for (int d = 0; d < graph_.n_columns; ++d) {
        stuck -= edges_.cap[threadIdx.x * graph_.n_columns + d];
      }
    }
    // The weights have mean 1.
    const float mean = Base::Sum(memory_.base) / static_cast<float>(graph_.n_ranks);
    float value[1] = {fmaxf(stuck * inverse_w_, 0)};
    team_.template Reduce<1>(value);
    const float scale = fmaxf(value[0], mean);
    const float unit = scale > 0 ? 1 / scale : 0;
    base_ *= unit;
    TeamOf::Sync();  // All have read memory.base.
    if (is_rank_) memory_.base[threadIdx.x] = base_;
    n_live_ = 0;
#pragma unroll
    for (int i = 0; i < kEdges; ++i) {
      cap_[i] = 0;
      x_[i] = xb_[i] = zl_[i] = zu_[i] = 1;
      uv_[i] = 0;
    }
    ForEdges([&](int i, int e) {
      const float cap = edges_.cap[e] * unit;
      uv_[i] = graph_.by_columns.Quotient(e) << 16 | graph_.dst[e];
      if (cap > kLeastEdge * memory_.w[U(i)]) {
        cap_[i] = cap;
        x_[i] = xb_[i] = cap / 2;
        n_live_ += 1;
      }
      edges_.flow[e] = cap_[i] / 2;
    });
    TeamOf::Sync();
    return scale;
  }

  __device__ void Start() {
    load_ = is_rank_ ? base_ + Gather(edges_.flow) : 0;
    const float mu = this->StartRanks(2 * n_live_);
    ForEdges([&](int i, int) {
      if (!Live(i)) return;
      const float m = Quotient(kStartProduct * mu, x_[i]);
      const float h = (memory_.y[V(i)] - memory_.y[U(i)]) / 2;
      const float larger = __fsqrt_rn(m * m + h * h) + fabsf(h);
      const float smaller = Quotient(m * m, larger);
      zl_[i] = h > 0 ? larger : smaller;
      zu_[i] = h > 0 ? smaller : larger;
    });
  }

  // Evaluates the plan and the cuts by y. Returns whether the plan is the best so far. Inputs: y
  // and the edges' x. Outputs: load_ of the plan, and the edges' ends.
  __device__ __forceinline__ bool UpdateBest(bool first) {
    ForEdges([&](int i, int e) {
      edges_.flow[e] = Plan(i);
      edges_.ends[e] = make_float4(memory_.y[U(i)], memory_.y[V(i)], cap_[i], 0);
    });
    TeamOf::Sync();
    load_ = is_rank_ ? base_ + Gather(edges_.flow) : 0;

    // Among the sets {ranks whose y is at least y_r}, finds the one that proves most. The threads
    // of row r share its work.
    const float least = memory_.y[table_.row()];
    // With fewer rows than a warp has lanes, each row has several copies, which share the work.
    constexpr int kTimes = kThreads / TableOf::kUsed;
    constexpr int kShare = TableOf::kColumns / kTimes;
    constexpr int kStride = kParts * kTimes;
    const int copy = threadIdx.x / TableOf::kUsed;
    float stuck = 0;
    float weight = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int rank = table_.first_column() + copy * kShare + i;
      const bool inside = memory_.y[rank] >= least;
      stuck += inside ? memory_.base[rank] : 0;
      weight += inside ? memory_.w[rank] : 0;
    }
#pragma unroll 1
    for (int e = threadIdx.x % kParts + kParts * copy; e < n_edges_; e += 4 * kStride) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 ends = edges_.ends[e + i * kStride];
        stuck -= ends.x >= least && ends.y < least ? ends.z : 0;
      }
    }
#pragma unroll
    for (int lanes = TableOf::kUsed; lanes < kThreads; lanes *= 2) {
      stuck += __shfl_xor_sync(kFullWarp, stuck, lanes);
      weight += __shfl_xor_sync(kFullWarp, weight, lanes);
    }
    stuck = TableOf::OverRow(stuck);
    weight = TableOf::OverRow(weight);
    return this->KeepBest(first, stuck, weight);
  }

  // dy_v − dy_u of an edge.
  __device__ __forceinline__ float Difference(int i) const { return Base::Difference(U(i), V(i)); }

  __device__ __forceinline__ void Step() {
    // The matrix, and the predictor's right-hand side. Its targets are 0, so g = y_u − y_v.
    float ix[kEdges], ixb[kEdges], H[kEdges], g[kEdges];
    ForEdges([&](int i, int e) {
      const float4 ends = edges_.ends[e];
      ix[i] = Quotient(1, x_[i]);
      ixb[i] = Quotient(1, xb_[i]);
      H[i] = Live(i) ? Quotient(1, zl_[i] * ix[i] + zu_[i] * ixb[i]) : 0;
      g[i] = ends.x - ends.y;
      edges_.H[e] = H[i];
      edges_.flow[e] = H[i] * g[i];
    });
    this->BeginStep();
    TeamOf::Sync();
    this->SetRightSide(is_rank_ ? Gather(edges_.flow) : 0);
    Assemble();
    this->FactorMatrix();

    // Predictor: aims straight at the solution. How far it gets determines how much to centre.
    this->Saddle();
    float el[kEdges], eu[kEdges];
    float value[5] = {0, 0, 0, 0, 0};  // Reciprocals of the limits; products of v·v, d·v, d·d.
    ForEdges([&](int i, int) {
      if (!Live(i)) return;
      const float dx = H[i] * (g[i] - Difference(i));
      const float a = dx * ix[i];
      const float b = dx * ixb[i];
      const float dzl = -zl_[i] * (1 + a);
      const float dzu = zu_[i] * (b - 1);
      value[0] = fmaxf(value[0], fmaxf(-a, b));
      value[1] = fmaxf(value[1], fmaxf(1 + a, 1 - b));
      value[2] += x_[i] * zl_[i] + xb_[i] * zu_[i];
      value[3] += dx * (zl_[i] - zu_[i]);
      value[4] += dx * (dzl - dzu);
      el[i] = dx * dzl;
      eu[i] = dx * dzu;
    });
    float c;
    const float target = this->Target(value, c);

    // Corrector: the same matrix, with the predictor's second-order terms.
    ForEdges([&](int i, int e) {
      if (!Live(i)) {
        edges_.flow[e] = 0;
        return;
      }
      el[i] = (target - c * el[i]) * ix[i];
      eu[i] = (target + c * eu[i]) * ixb[i];
      g[i] += el[i] - eu[i];
      edges_.flow[e] = H[i] * g[i];
    });
    TeamOf::Sync();
    this->CorrectRightSide(target, c, is_rank_ ? Gather(edges_.flow) : 0);
    TeamOf::Sync();
    const float dt = this->Saddle();
    float limit[2] = {0, 0};
    ForEdges([&](int i, int) {
      if (!Live(i)) return;
      const float dx = H[i] * (g[i] - Difference(i));
      const float a = dx * ix[i];
      const float b = dx * ixb[i];
      limit[0] = fmaxf(limit[0], fmaxf(-a, b));
      limit[1] =
          fmaxf(limit[1], fmaxf(1 + a - Quotient(el[i], zl_[i]), 1 - b - Quotient(eu[i], zu_[i])));
      g[i] = dx;
    });
    float ap, ad;
    this->StepLengths(limit, ap, ad);
    ForEdges([&](int i, int) {
      if (!Live(i)) return;
      const float dx = g[i];
      const float dzl = el[i] - zl_[i] * (1 + dx * ix[i]);
      const float dzu = eu[i] - zu_[i] * (1 - dx * ixb[i]);
      const float least = LeastPrimal(cap_[i]);
      x_[i] = fmaxf(x_[i] + ap * dx, least);
      xb_[i] = fmaxf(xb_[i] - ap * dx, least);
      zl_[i] = fmaxf(zl_[i] + ad * dzl, kLeastDual);
      zu_[i] = fmaxf(zu_[i] + ad * dzu, kLeastDual);
    });
    this->MoveRanks(ap, ad, dt);
  }

  // The off-diagonals of this thread's part of a row.
  __device__ __forceinline__ void Assemble() {
#pragma unroll
    for (int i = 0; i < TableOf::kColumns; ++i) table_[i] = 0;
    if (table_.row() >= graph_.n_ranks) return;
#pragma unroll 2
    for (int d = 0; d < graph_.n_columns; ++d) {
      const int at = table_.row() * graph_.n_columns + d;
      const int from = graph_.src[at];
      const int to = graph_.dst[at] - table_.first_column();
      const float out = edges_.H[at];
      const float in = edges_.H[from * graph_.n_columns + d];
#pragma unroll
      for (int i = 0; i < TableOf::kColumns; ++i) {
        if (i == to) table_[i] += out;
        if (i == from - table_.first_column()) table_[i] += in;
      }
    }
  }

  const Graph graph_;
  const GroupArrays edges_;
  const int n_edges_;
  float n_live_;

  // This thread's edges.
  int uv_[kEdges];     // The edge's ends, u in the high half.
  float cap_[kEdges];  // 0 if it does not count as an edge.
  float x_[kEdges], xb_[kEdges], zl_[kEdges], zu_[kEdges];
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_ITERATION_CUH_
