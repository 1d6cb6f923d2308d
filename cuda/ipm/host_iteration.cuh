// The interior point on any placement, by one team: lplb_jax/reference/networks.py explains it.
// Lanes side by side share an expert, and take its cells in turn; thread r adds up for rank r. Sums
// are over experts and slots in their order, never over cells in theirs, which is up to chance.
#ifndef LPLB_CUDA_IPM_HOST_ITERATION_CUH_
#define LPLB_CUDA_IPM_HOST_ITERATION_CUH_

#include "cuda/ipm/ranks.cuh"
#include "cuda/replica_graph.cuh"

namespace lplb::cuda {

// What experts and cells have in shared memory, besides the graph.
struct HostArrays {
  // [n_logical]
  float* total;      // Scaled by what makes the largest load / weight about 1; 0 without a host.
  float* least;      // The least y of its hosts.
  float* inverse_h;  // Of the sum of its hosts' conductances; 0 where it has nothing to divide.
  int32_t* main;     // Its cell with the largest conductance.
  int32_t* divided;  // Experts that have something to divide, in their order.
  // [n_physical], by cell
  float *x, *z, *h, *lack, *flow;
  float* share;  // Of the expert's load, in the best plan.
  // [n_ranks]
  int32_t* cut;  // Whether a rank is in the best cut.
};

// A rank's cells of shared experts; none beyond the last rank.
__device__ __forceinline__ int32_t CellsOf(const Problem& p, const GraphMemory& graph,
                                           int32_t rank) {
  const int32_t n_words = rank < p.ep_size ? GraphMemory::SlotWords(p) : 0;
  int32_t n = 0;
#pragma unroll 1
  for (int32_t w = 0; w < n_words; ++w) n += __popc(graph.is_shared[rank * n_words + w]);
  return n;
}

template <int kRanks, int kParts>
class HostInteriorPoint : RankIterate<kRanks, kParts, Table> {
  using Base = RankIterate<kRanks, kParts, Table>;

 public:
  using Base::kMostRanks;
  using Base::kThreads;
  using typename Base::TableOf;
  using typename Base::TeamOf;
  static constexpr int kWords = kRanks < 32 ? 1 : kRanks / 32;

  struct Memory {
    typename Base::Memory ranks;
    // The off-diagonals of every thread's part of a row; one place more, so that the threads of a
    // warp begin in different banks.
    float row[Base::kThreads][TableOf::kColumns + 1];
    int32_t n_divided;
  };

  __device__ HostInteriorPoint(const Problem& p, const GraphMemory& graph, Memory& memory,
                               const HostArrays& arrays)
      : Base(p.ep_size, memory.ranks),
        p_(p),
        graph_(graph),
        memory_(memory),
        arrays_(arrays),
        n_cells_(CellsOf(p, graph, threadIdx.x)) {}

  // In: the ranks' base and w, of which base is what cannot leave a rank; the experts' totals,
  // whose sum must be a float; a barrier is behind them. Out: the shares of all cells of experts
  // with several hosts, and the best cut. Ends with a barrier of the team.
  __device__ void Run() {
    Scale();
    Start();
    for (int n = 0;; ++n) {
      if (UpdateBest(n == 0)) {
        ForExperts([&](const Expert& e) {
          ForCells(e, [&](int c, int) { arrays_.share[c] = arrays_.flow[c]; });
        });
      }
      if (this->Done(n)) break;
      Step();
    }
    if (is_rank_) arrays_.cut[threadIdx.x] = in_cut_;
    TeamOf::Sync();
  }

 private:
  using Base::base_;
  using Base::in_cut_;
  using Base::inverse_w_;
  using Base::is_rank_;
  using Base::load_;
  using Base::table_;
  using Base::team_;
  using Base::w_;

  static constexpr int kLanes = 4;  // That share an expert.
  static constexpr int kParallel = kThreads / kLanes;
  static_assert(TableOf::kUsed == kThreads, "every thread has a part of a row");

  struct Expert {
    int id;
    int first;    // cell
    int n_hosts;  // 0: none
  };

  __device__ __forceinline__ int RankOf(int cell) const {
    return p_.by_slots.Quotient(graph_.slot[cell]);
  }

  // Calls function(expert) for every expert that has something to divide, kLanes threads for each;
  // so all threads of a warp come as often.
  template <typename Function>
  __device__ __forceinline__ void ForExperts(Function&& function) const {
#pragma unroll 1
    for (int begin = 0; begin < memory_.n_divided; begin += kParallel) {
      const int i = begin + threadIdx.x / kLanes;
      Expert e = {0, 0, 0};
      if (i < memory_.n_divided) {
        e.id = arrays_.divided[i];
        e.first = graph_.first[e.id];
        e.n_hosts = HostsOf<kWords>(graph_, e.id);
      }
      function(e);
    }
  }

  // Calls function(cell, rank) for this lane's cells of the expert.
  template <typename Function>
  __device__ __forceinline__ void ForCells(const Expert& e, Function&& function) const {
#pragma unroll 1
    for (int k = threadIdx.x % kLanes; k < e.n_hosts; k += kLanes) {
      function(e.first + k, RankOf(e.first + k));
    }
  }

  static __device__ __forceinline__ bool IsFirstLane() { return threadIdx.x % kLanes == 0; }

  // Over the lanes of an expert.
  static __device__ __forceinline__ float SumOfLanes(float value) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      value += __shfl_xor_sync(kFullWarp, value, step);
    }
    return value;
  }
  static __device__ __forceinline__ float LeastOfLanes(float value) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      value = fminf(value, __shfl_xor_sync(kFullWarp, value, step));
    }
    return value;
  }

  // The sum of value(expert, cell) over the cells of this thread's rank, in the order of its slots.
  template <typename Value>
  __device__ __forceinline__ float Gather(Value&& value) const {
    float sum = 0;
    const uint32_t* mine = graph_.shared + threadIdx.x * p_.slots_per_rank;
#pragma unroll 2
    for (int k = 0; k < n_cells_; ++k) {
      sum += value(ExpertIn(mine[k]), CellIn(mine[k]));
    }
    return sum;
  }
  __device__ __forceinline__ float GatherFlow() const {
    return Gather([&](int, int c) { return arrays_.flow[c]; });
  }

  // Divides all loads by their scale, and finds the experts that have something to divide: others
  // are on the first of their fastest hosts.
  __device__ void Scale() {
    this->LoadRank();
    float value[2] = {fmaxf(base_ * inverse_w_, 0), 0};
#pragma unroll 1
    for (int e = threadIdx.x; e < p_.n_logical; e += kThreads) value[1] += arrays_.total[e];
    team_.template Reduce<1>(value);
    // The weights' mean is 1.
    const float scale = fmaxf(value[0], value[1] / static_cast<float>(p_.ep_size));
    const float unit = scale > 0 ? 1 / scale : 0;
    base_ *= unit;
    if (is_rank_) memory_.ranks.base[threadIdx.x] = base_;
#pragma unroll 1
    for (int e = threadIdx.x; e < p_.n_logical; e += kThreads) {
      arrays_.total[e] *= unit;
      arrays_.inverse_h[e] = 0;
    }
    TeamOf::Sync();
    if (threadIdx.x < 32) FindDivided();
    TeamOf::Sync();
  }

  // By one warp.
  __device__ __forceinline__ void FindDivided() const {
    int n = 0;
#pragma unroll 1
    for (int begin = 0; begin < p_.n_logical; begin += 32) {
      const int e = begin + static_cast<int>(threadIdx.x);
      const int n_hosts = e < p_.n_logical ? HostsOf<kWords>(graph_, e) : 0;
      bool divided = false;
      if (n_hosts > 1) {
        int fastest = graph_.first[e];
#pragma unroll 1
        for (int c = graph_.first[e]; c < graph_.first[e] + n_hosts; ++c) {
          if (memory_.ranks.w[RankOf(c)] > memory_.ranks.w[RankOf(fastest)]) fastest = c;
        }
        divided = arrays_.total[e] > kLeastEdge * memory_.ranks.w[RankOf(fastest)];
#pragma unroll 1
        for (int c = graph_.first[e]; c < graph_.first[e] + n_hosts; ++c) {
          arrays_.h[c] = arrays_.flow[c] = 0;
          arrays_.share[c] = c == fastest;
        }
      }
      const uint32_t votes = __ballot_sync(kFullWarp, divided);
      if (divided) arrays_.divided[n + __popc(votes & ((1u << threadIdx.x) - 1))] = e;
      n += __popc(votes);
    }
    if (threadIdx.x == 0) memory_.n_divided = n;
  }

  // All hosts have equally much.
  __device__ void Start() {
    float n_pairs = 0;
    ForExperts([&](const Expert& e) {
      ForCells(e, [&](int c, int) {
        arrays_.x[c] = arrays_.flow[c] = arrays_.total[e.id] / static_cast<float>(e.n_hosts);
        n_pairs += 1;
      });
    });
    TeamOf::Sync();
    load_ = base_ + GatherFlow();
    const float mu = this->StartRanks(n_pairs);
    ForExperts([&](const Expert& e) {
      float least = kNoLimit;
      ForCells(e, [&](int, int r) { least = fminf(least, memory_.ranks.y[r]); });
      least = LeastOfLanes(least);
      ForCells(e, [&](int c, int r) {
        const float m = Quotient(kStartProduct * mu, arrays_.x[c]);
        arrays_.z[c] = memory_.ranks.y[r] - least + m;
      });
    });
  }

  // Measures the plan and the cuts by y; says whether the plan, then in flow, is the best so far.
  // Out: load_ of the plan.
  __device__ __forceinline__ bool UpdateBest(bool first) {
    ForExperts([&](const Expert& e) {
      float sum = 0;
      float least = kNoLimit;
      ForCells(e, [&](int c, int r) {
        sum += fmaxf(arrays_.x[c], 0);
        least = fminf(least, memory_.ranks.y[r]);
      });
      sum = SumOfLanes(sum);
      least = LeastOfLanes(least);
      // Equal shares where x is no number.
      const bool good = sum > 0 && sum < kNoLimit;
      ForCells(e, [&](int c, int) {
        arrays_.flow[c] = good ? fmaxf(arrays_.x[c], 0) / sum : 1 / static_cast<float>(e.n_hosts);
      });
      if (e.n_hosts > 0 && IsFirstLane()) arrays_.least[e.id] = least;
    });
    TeamOf::Sync();
    load_ = base_ + Gather([&](int e, int c) { return arrays_.flow[c] * arrays_.total[e]; });

    // Of the sets {ranks whose y is at least y_r} the one that proves most. The threads of row r
    // share its work.
    const float least = memory_.ranks.y[table_.row()];
    float stuck = 0;
    float weight = 0;
#pragma unroll
    for (int i = 0; i < TableOf::kColumns; ++i) {
      const int rank = table_.first_column() + i;
      const bool inside = memory_.ranks.y[rank] >= least;
      stuck += inside ? memory_.ranks.base[rank] : 0;
      weight += inside ? memory_.ranks.w[rank] : 0;
    }
#pragma unroll 2
    for (int i = threadIdx.x % kParts; i < memory_.n_divided; i += kParts) {
      const int e = arrays_.divided[i];
      stuck += arrays_.least[e] >= least ? arrays_.total[e] : 0;
    }
    stuck = TableOf::OverRow(stuck);
    weight = TableOf::OverRow(weight);
    return this->KeepBest(first, stuck, weight);
  }

  // What moves by drive(cell, rank, main cell, main's rank), the difference of what drives it to
  // what drives the main cell: nothing in sum over an expert's hosts. It goes to flow, and by
  // use(cell, dx) to this lane.
  template <typename Drive, typename Use>
  __device__ __forceinline__ void Flow(const Expert& e, int main, float inverse, Drive&& drive,
                                       Use&& use) const {
    const int rank_of_main = e.n_hosts > 0 ? RankOf(main) : 0;
    float mean = 0;
    ForCells(e, [&](int c, int r) {
      arrays_.flow[c] = drive(c, r, main, rank_of_main);
      mean += arrays_.h[c] * inverse * arrays_.flow[c];
    });
    mean = SumOfLanes(mean);
    float others = 0;
    ForCells(e, [&](int c, int) {
      arrays_.flow[c] = c == main ? 0 : arrays_.h[c] * (arrays_.flow[c] - mean);
      others += arrays_.flow[c];
    });
    others = SumOfLanes(others);
    ForCells(e, [&](int c, int) {
      if (c == main) arrays_.flow[c] = -others;
      use(c, arrays_.flow[c]);
    });
  }

  template <typename Drive, typename Use>
  __device__ __forceinline__ void FlowOfAll(Drive&& drive, Use&& use) const {
    ForExperts([&](const Expert& e) {
      Flow(e, arrays_.main[e.id], arrays_.inverse_h[e.id], drive,
           [&](int c, float dx) { use(e, c, dx); });
    });
  }

  __device__ __forceinline__ void Step() {
    const float* y = memory_.ranks.y;
    // The matrix, and the predictor's right-hand side. Its targets are 0, which makes −y drive.
    ForExperts([&](const Expert& e) {
      float sum = 0;
      float largest = -1;
      int main = e.first;
      ForCells(e, [&](int c, int) {
        const float h = Quotient(arrays_.x[c], arrays_.z[c]);
        arrays_.h[c] = h;
        sum += h;
        if (h > largest) {
          largest = h;
          main = c;
        }
      });
      const float inverse = Quotient(1, SumOfLanes(sum));
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        const float h = __shfl_xor_sync(kFullWarp, largest, step);
        const int c = __shfl_xor_sync(kFullWarp, main, step);
        if (h > largest || (h == largest && c < main)) {
          largest = h;
          main = c;
        }
      }
      if (e.n_hosts > 0 && IsFirstLane()) {
        arrays_.main[e.id] = main;
        arrays_.inverse_h[e.id] = inverse;
      }
      Flow(
          e, main, inverse, [&](int, int r, int, int m) { return y[m] - y[r]; }, [](int, float) {});
    });
    this->BeginStep();
    TeamOf::Sync();
    this->SetRightSide(GatherFlow());
    Assemble();
    this->FactorMatrix();

    // Predictor: straight at the solution. How far it gets says how much to centre.
    this->Saddle();
    float value[5] = {0, 0, 0, 0, 0};  // Reciprocals of the limits; products of v·v, d·v, d·d.
    FlowOfAll([&](int, int r, int, int m) { return y[m] - y[r] - Base::Difference(m, r); },
              [&](const Expert&, int c, float dx) {
                const float x = arrays_.x[c];
                const float z = arrays_.z[c];
                const float a = Quotient(dx, x);
                const float dz = -z * (1 + a);
                value[0] = fmaxf(value[0], -a);
                value[1] = fmaxf(value[1], 1 + a);
                value[2] += x * z;
                value[3] += dx * z;
                value[4] += dx * dz;
                arrays_.lack[c] = dx * dz;
              });
    float second;
    const float target = this->Target(value, second);

    // Corrector: the same matrix, with the predictor's second-order terms. What it lacks is / x.
    ForExperts([&](const Expert& e) {
      ForCells(e, [&](int c, int) {
        arrays_.lack[c] = Quotient(target - second * arrays_.lack[c], arrays_.x[c]);
      });
    });
    TeamOf::Sync();
    const auto lack = [&](int c, int r, int main, int m) {
      return arrays_.lack[c] - arrays_.lack[main] - (y[r] - y[m]);
    };
    FlowOfAll(lack, [](const Expert&, int, float) {});
    TeamOf::Sync();
    this->CorrectRightSide(target, second, GatherFlow());
    TeamOf::Sync();
    const float dt = this->Saddle();
    float limit[2] = {0, 0};
    FlowOfAll(
        [&](int c, int r, int main, int m) { return lack(c, r, main, m) - Base::Difference(m, r); },
        [&](const Expert&, int c, float dx) {
          const float a = Quotient(dx, arrays_.x[c]);
          limit[0] = fmaxf(limit[0], -a);
          limit[1] = fmaxf(limit[1], 1 + a - Quotient(arrays_.lack[c], arrays_.z[c]));
        });
    float ap, ad;
    this->StepLengths(limit, ap, ad);
    ForExperts([&](const Expert& e) {
      const float least = LeastPrimal(arrays_.total[e.id]);
      ForCells(e, [&](int c, int) {
        const float x = arrays_.x[c];
        const float z = arrays_.z[c];
        const float dx = arrays_.flow[c];
        const float dz = arrays_.lack[c] - z * (1 + Quotient(dx, x));
        arrays_.x[c] = fmaxf(x + ap * dx, least);
        arrays_.z[c] = fmaxf(z + ad * dz, kLeastDual);
      });
    });
    TeamOf::Sync();  // All have read y.
    this->MoveRanks(ap, ad, dt);
  }

  // The off-diagonals of this thread's part of a row, h_r h_q / Σh over the experts on both.
  __device__ __forceinline__ void Assemble() {
    float (&row)[TableOf::kColumns + 1] = memory_.row[threadIdx.x];
#pragma unroll
    for (int i = 0; i < TableOf::kColumns; ++i) row[i] = 0;
    const int rank = table_.row();
    const int n_cells = CellsOf(p_, graph_, rank);
    constexpr uint32_t kMine = TableOf::kColumns == 32 ? ~0u : (1u << TableOf::kColumns % 32) - 1;
    const int begin = table_.first_column();
#pragma unroll 1
    for (int k = 0; k < n_cells; ++k) {
      const uint32_t packed = graph_.shared[rank * p_.slots_per_rank + k];
      const int e = ExpertIn(packed);
      const float weight = arrays_.h[CellIn(packed)] * arrays_.inverse_h[e];
      const uint32_t* mask = graph_.mask + e * kWords;
      int c = graph_.first[e] + PlaceOf<kWords>(mask, begin);
#pragma unroll 1
      for (uint32_t bits = mask[begin / 32] >> begin % 32 & kMine; bits != 0; bits &= bits - 1) {
        const int i = __ffs(bits) - 1;
        if (begin + i != rank) row[i] += weight * arrays_.h[c];
        ++c;
      }
    }
#pragma unroll
    for (int i = 0; i < TableOf::kColumns; ++i) table_[i] = row[i];
  }

  const Problem& p_;
  const GraphMemory& graph_;
  Memory& memory_;
  const HostArrays arrays_;
  const int n_cells_;  // Of this thread's rank.
};

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_HOST_ITERATION_CUH_
