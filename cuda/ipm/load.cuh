// The shared memory of the interior point's block, and how loads and weights get there.
#ifndef LPLB_CUDA_IPM_LOAD_CUH_
#define LPLB_CUDA_IPM_LOAD_CUH_

#include <cfloat>

#include "cuda/ipm/iteration.cuh"
#include "cuda/solver.cuh"

namespace lplb::cuda {

// If a column of r2o is not a permutation, removes all edges and sets the status; parts of `dst`
// are then unset. Only the warp that called LoadTopology may call it.
__device__ __forceinline__ void DropBrokenTopology(const Problem& p, const GroupMemory& memory) {
  const int32_t lane = threadIdx.x & 31;
  const int32_t n_edges = p.group_size * p.n_columns;
  bool broken = false;
  __syncwarp();
#pragma unroll 1
  for (int32_t i = lane; i < n_edges; i += 32) {
    const int32_t rank = p.by_columns.Quotient(i);
    const int32_t column = i - rank * p.n_columns;
    broken |= memory.dst[memory.src[i] * p.n_columns + column] != rank;
  }
  if (!__any_sync(kFullWarp, broken)) return;
#pragma unroll 1
  for (int32_t i = lane; i < n_edges; i += 32) {
    memory.src[i] = memory.dst[i] = p.by_columns.Quotient(i);
  }
  if (lane == 0) atomicOr(memory.status, kBadPlacement);
}

// The shared memory of a group besides the interior point's own.
struct IpmMemory {
  float4* ends;           // [edges, padded], see InteriorPoint
  float *cap, *flow, *H;  // [n_edges]
  float* weight;          // [n_ranks]
  int32_t* cut;           // [n_ranks], whether a rank is in the best cut
  int32_t* load;          // [n_ranks], of the rounded plan
  GroupMemory group;      // `own` holds words as in loads; `cap` tokens, or units for the proof

  static __host__ __device__ int64_t Bytes(const Problem& p) {
    const int64_t edges = static_cast<int64_t>(p.group_size) * p.n_columns;
    return 16 * PaddedEdges(edges) + 4 * (3 * edges + 3 * p.group_size + GroupMemory::Words(p, 1));
  }

  __device__ IpmMemory(const Problem& p, char* memory)
      : ends(reinterpret_cast<float4*>(memory)),
        cap(reinterpret_cast<float*>(ends + PaddedEdges(p.group_size * p.n_columns))),
        flow(cap + p.group_size * p.n_columns),
        H(flow + p.group_size * p.n_columns),
        weight(H + p.group_size * p.n_columns),
        cut(reinterpret_cast<int32_t*>(weight + p.group_size)),
        load(cut + p.group_size),
        group(p, 1, load + p.group_size) {}
};

// What the threads of the block share.
struct Shared {
  float bound;       // The proven bound on float loads, or on load / weight.
  int32_t target;    // The proven bound in tokens on ranks of equal speed.
  int32_t max_load;  // Or the bits of a float.
  int32_t most;      // For real loads, the bits of the largest load of a rank.
  bool overflow;
};

__device__ __forceinline__ float WarpSum(float value) {
  float values[1] = {value};
  Team<32>::SumUp<0>(values);
  return values[0];
}

// Sums totals of int32 loads straight from the buffer: only the group's own experts are needed.
struct LoadedTotals {
  const int32_t* loads;
  Sources sources;

  __device__ __forceinline__ int2 operator[](int32_t expert) const {
    return SumSources(loads, sources, expert);
  }
};

// An expert's real load over all sources.
struct RealTotal {
  float load;
  bool negative;  // Or NaN.
};

__device__ __forceinline__ RealTotal SumRealSources(const float* loads, const Sources& sources,
                                                    int32_t expert) {
  RealTotal total = {0, false};
#pragma unroll 4
  for (int32_t s = 0; s < sources.n_sources; ++s) {
    const float load = loads[s * sources.row + expert];
    total.negative |= !(load >= 0);
    total.load += load >= 0 ? load : 0;
  }
  total.load = fminf(total.load, FLT_MAX);  // Still counts as an overflow.
  return total;
}

// LoadRanks for float loads. The ranks' sums go to `base`.
__device__ __forceinline__ void LoadRealRanks(const Problem& p, const SolveOperands& in,
                                              Groups groups, const PrefetchedSlot& fetched,
                                              const Sources& sources, const GroupMemory& memory,
                                              float* base) {
  const Tile tile(p, blockDim.x);
  const int32_t first_slot = groups.first * p.group_size * p.slots_per_rank;
  const int32_t first_of_warp = (threadIdx.x & ~31) >> p.tile_log2;
  const float* loads = reinterpret_cast<const float*>(in.loads);
  int32_t expert = fetched.expert;
#pragma unroll 1
  for (int32_t step = 0; first_of_warp + step < p.group_size; step += tile.n) {
    const int32_t rank = tile.index + step;
    const int32_t end = rank < p.group_size ? p.n_local : 0;
    const int32_t* slots = in.phy2log + first_slot + rank * p.slots_per_rank;
    bool negative = false;
    float sum = 0;
#pragma unroll 1
    for (int32_t k = tile.lane; k < end; k += tile.width) {
      if (step > 0 || k >= tile.width) expert = slots[k];
      const RealTotal total = SumRealSources(loads, sources, KnownExpert(p, expert));
      negative |= total.negative;
      reinterpret_cast<float*>(memory.own)[rank * p.n_local + k] = total.load;
      sum += total.load;
    }
#pragma unroll
    for (int32_t distance = 16; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(kFullWarp, sum, distance);
      if (distance < tile.width) sum += other;
    }
    if (negative) atomicOr(memory.status, kNegativeLoad);
    if (tile.lane == 0 && rank < p.group_size) base[rank] = sum;
  }
}

// Loads the ranks' weights, scaled to mean 1, by one warp. If one is not a valid speed, all count
// as equal. None counts as less than kLeastWeight of the largest. Both cases set a status bit.
__device__ __forceinline__ void LoadWeights(int32_t n_ranks, const IpmOptions& options,
                                            const float* weights, float* weight, float* w,
                                            int32_t* status) {
  const int32_t lane = threadIdx.x & 31;
  bool good = options.weighted;
  float largest = 0;
#pragma unroll 1
  for (int32_t r = lane; r < n_ranks && good; r += 32) {
    good = IsSpeed(weights[r]);
    largest = fmaxf(largest, weights[r]);
  }
  good = __all_sync(kFullWarp, good);
  bool taken = good;
  float mean = 1;
  float power = 0;
  float least = 1;
  if (good) {
    largest = Team<32>::WarpMax(largest);
    power = PowerOfTwo(-Exponent(largest));  // Their sum could overflow otherwise.
    least = kLeastWeight * (largest * power);
    float sum = 0;
#pragma unroll 1
    for (int32_t r = lane; r < n_ranks; r += 32) {
      taken &= weights[r] * power >= least;
      sum += fmaxf(weights[r] * power, least);
    }
    mean = WarpSum(sum) / static_cast<float>(n_ranks);
  }
#pragma unroll 1
  for (int32_t r = lane; r < n_ranks; r += 32) {
    w[r] = weight[r] = good ? fmaxf(weights[r] * power, least) / mean : 1;
  }
  if (options.weighted && !taken) atomicOr(status, kNotConverged);
}

// Checks for ids that named no expert, which rows of loads may count in their last place. By one
// warp.
template <typename Load>
__device__ __forceinline__ void CheckInvalid(const Problem& p, const Sources& sources,
                                             const int32_t* loads, int32_t* status) {
  if (sources.row <= p.n_logical) return;
#pragma unroll 1
  for (int32_t s = threadIdx.x & 31; s < sources.n_sources; s += 32) {
    const int64_t last = static_cast<int64_t>(s) * sources.row + p.n_logical;
    if (reinterpret_cast<const Load*>(loads)[last] != 0) atomicOr(status, kInvalidIndex);
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_IPM_LOAD_CUH_
