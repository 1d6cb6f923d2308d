#include <cooperative_groups.h>

#include <algorithm>

#include "cuda/batch_copies.cuh"
#include "cuda/batch_copies.h"
#include "cuda/cluster.cuh"
#include "cuda/device.h"
#include "cuda/launch.cuh"
#include "cuda/replica_graph.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kMostThreads = 1024;

// How the attempts are dealt out: every block makes n_attempts of them side by side.
struct AttemptShape {
  int32_t n_blocks;  // a cluster, where there is more than one
  int32_t n_attempts;
};

// The blocks of one batch element. All have the same homes.
struct Blocks {
  int32_t n;
  int32_t index;

  __device__ explicit Blocks(int32_t n_) : n(n_), index(0) {
#if __CUDA_ARCH__ >= 900
    if (n > 1) index = cooperative_groups::this_cluster().block_rank();
#endif
  }

  // All blocks call both, before they write to one another.
  __device__ __forceinline__ void Announce() const {
#if __CUDA_ARCH__ >= 900
    if (n > 1) AnnounceStart();
#endif
  }
  __device__ __forceinline__ void AwaitOthers() const {
#if __CUDA_ARCH__ >= 900
    if (n > 1) AwaitStarts();
#endif
  }

  // A barrier of all blocks, behind which they see what they have written to one another.
  __device__ __forceinline__ void Sync() const {
#if __CUDA_ARCH__ >= 900
    if (n > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  // What is in `block` at the place of `mine` here.
  template <typename T>
  __device__ __forceinline__ T* Of(int32_t block, T* mine) const {
#if __CUDA_ARCH__ >= 900
    if (n > 1) return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#endif
    return mine;
  }
};

// An expert's tokens from all sources, negative ones as 0.
__device__ __forceinline__ int64_t TokensOf(const Sources& sources, const int32_t* loads,
                                            int32_t expert) {
  constexpr int kInFlight = 16;  // Rows that are waited for together.
  int64_t total = 0;
#pragma unroll 1
  for (int32_t begin = 0; begin < sources.n_sources; begin += kInFlight) {
    int32_t load[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int32_t s = begin + i;
      load[i] = s < sources.n_sources ? loads[s * sources.row + expert] : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) total += max(load[i], 0);
  }
  return total;
}

// Totals and tables, and which slots are homes; ends with a barrier. *sums must be 0, and a barrier
// passed.
__device__ __forceinline__ void LoadHomes(const Problem& p, const Sources& sources,
                                          const SolveOperands& in, const CopiesMemory& memory) {
  const int32_t lane = threadIdx.x & 31;
  const int32_t n_threads = blockDim.x;
  uint32_t high = 0;
  uint32_t low = 0;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += n_threads) memory.expert[i] = in.phy2log[i];
#pragma unroll 1
  for (int32_t e = threadIdx.x; e < p.n_logical; e += n_threads) {
    memory.home[e] = in.log2phy[e * p.max_replicas];
    // So that the sums of halves stay below 2³²: it is too much anyway.
    const int64_t total = min(TokensOf(sources, in.loads, e), int64_t{kInt32Max} + 1);
    high += static_cast<uint32_t>(total >> 16);
    low += static_cast<uint32_t>(total & 0xffff);
    memory.total[e] = static_cast<int32_t>(min(total, int64_t{kInt32Max}));
  }
  high = __reduce_add_sync(kFullWarp, high);
  low = __reduce_add_sync(kFullWarp, low);
  if (lane < 2) atomicAdd(&memory.sums[lane], static_cast<int32_t>(lane == 0 ? high : low));
  __syncthreads();

  const uint64_t sum = (static_cast<uint64_t>(static_cast<uint32_t>(memory.sums[0])) << 16) +
                       static_cast<uint32_t>(memory.sums[1]);
  // So many are too much for the solver, too: then there are no copies.
  const bool too_many = sum > static_cast<uint64_t>(kInt32Max);
#pragma unroll 1
  for (int32_t rank = threadIdx.x / 32; rank < p.ep_size; rank += n_threads / 32) {
    uint32_t load = 0;
    int32_t n_free = 0;
    int32_t most = -1;
    int32_t hottest = 0;
#pragma unroll 2
    for (int32_t begin = 0; begin < p.slots_per_rank; begin += 32) {
      const int32_t k = begin + lane;
      const int32_t slot = rank * p.slots_per_rank + k;
      const bool live = k < p.slots_per_rank;
      const int32_t expert = live ? memory.expert[slot] : -1;
      const bool known = expert >= 0 && expert < p.n_logical;
      const bool is_home = known && memory.home[expert] == slot;
      const int32_t tokens = is_home && !too_many ? memory.total[expert] : 0;
      const uint32_t free = __ballot_sync(kFullWarp, live && !is_home);
      if (live) {
        const int32_t nth = n_free + __popc(free & ((1u << lane) - 1));
        memory.expert[slot] = is_home ? expert : -1 - nth;
        memory.tokens[slot] = tokens;
        hottest = tokens > most ? k : hottest;
        most = max(most, tokens);
      }
      load += tokens;
      n_free += __popc(free);
    }
    load = __reduce_add_sync(kFullWarp, load);
    const int32_t of_all = __reduce_max_sync(kFullWarp, most);
    hottest = __reduce_min_sync(kFullWarp, most == of_all ? hottest : kInt32Max);
    if (lane == 0) {
      memory.load[rank] = static_cast<int32_t>(load);
      memory.n_free[rank] = n_free;
      memory.hottest[rank] = hottest;
    }
  }
  __syncthreads();
}

// The mean and the largest load; every warp finds them.
template <int kWords>
__device__ __forceinline__ int2 MeanAndMost(const Problem& p, const CopiesMemory& memory) {
  int32_t load[kWords];
  int32_t most = 0;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int32_t rank = 32 * w + static_cast<int32_t>(threadIdx.x & 31);
    load[w] = rank < p.ep_size ? memory.load[rank] : 0;
    most = max(most, load[w]);
  }
  return {WarpCeilMean(load, SmallDivisor(p.ep_size)), __reduce_max_sync(kFullWarp, most)};
}

// Writes the tables as they are without copies, every block a part. Copies may be written behind a
// barrier of the blocks.
__device__ __forceinline__ void WriteHomes(const Problem& p, const CopiesMemory& memory,
                                           const Blocks& blocks, int32_t width,
                                           const CopiesResults& out) {
  const int32_t thread = blocks.index * blockDim.x + threadIdx.x;
  const int32_t stride = blocks.n * blockDim.x;
#pragma unroll 1
  for (int32_t i = thread; i < p.n_physical; i += stride) {
    out.phy2log[i] = max(memory.expert[i], -1);
  }
  // A warp has whole rows.
  const int32_t lane = threadIdx.x & 31;
#pragma unroll 2
  for (int32_t e = thread / 32; e < p.n_logical; e += stride / 32) {
    const int32_t home = memory.home[e];
    const bool is_home = home >= 0 && home < p.n_physical && memory.expert[home] == e;
#pragma unroll 1
    for (int32_t k = lane; k < width; k += 32) {
      out.log2phy[e * width + k] = k == 0 && is_home ? home : -1;
    }
    if (lane == 0) out.logcnt[e] = is_home;
  }
}

// Adds the copies in `memory`, by one block. `hosts` [n_logical, kWords] must be 0, and a barrier
// passed; memory.tokens is used up.
template <int kWords>
__device__ __forceinline__ void WriteCopies(const Problem& p, const CopiesMemory& memory,
                                            int32_t width, uint32_t* hosts,
                                            const CopiesResults& out) {
  const int32_t n_threads = blockDim.x;
  int32_t* copies = memory.tokens;  // In every slot; −1 where there is none.
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += n_threads) {
    const int32_t nth = -1 - memory.expert[i];  // Of the rank's slots for copies.
    const int32_t rank = p.by_slots.Quotient(i);
    copies[i] = -1;
    if (nth < 0 || nth >= memory.n_taken[rank]) continue;
    const int32_t copy = memory.taken[rank * p.slots_per_rank + nth];
    copies[i] = copy;
    atomicOr(&hosts[copy * kWords + (rank >> 5)], 1u << (rank & 31));
    out.phy2log[i] = copy;
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_physical; i += n_threads) {
    const int32_t copy = copies[i];
    if (copy < 0) continue;
    const int32_t place = 1 + PlaceOf<kWords>(hosts + copy * kWords, p.by_slots.Quotient(i));
    // There is room unless other experts have no home, as in a table that contradicts itself.
    if (place < width) out.log2phy[copy * width + place] = i;
    int32_t n = 1;
#pragma unroll
    for (int w = 0; w < kWords; ++w) n += __popc(hosts[copy * kWords + w]);
    if (place == 1) out.logcnt[copy] = n;
  }
}

template <int kWords>
__global__ void __launch_bounds__(kMostThreads, 1)
    PlaceCopiesKernel(Problem p, Sources sources, SolveOperands first_in, int32_t fan_out,
                      int32_t width, AttemptShape shape, CopiesResults first_out) {
  extern __shared__ uint32_t hosts[];  // [n_logical, kWords], then the rest
  const Blocks blocks(shape.n_blocks);
  blocks.Announce();
  const int64_t element = blockIdx.x / shape.n_blocks;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const CopiesResults out = {first_out.phy2log + element * p.n_physical,
                             first_out.log2phy + element * (p.n_logical * width),
                             first_out.logcnt + element * p.n_logical};
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x & 31;
  int32_t* words = reinterpret_cast<int32_t*>(hosts + p.n_logical * kWords);
  const CopiesMemory memory(p, min(warp, shape.n_attempts - 1), words);
  if (threadIdx.x < 2) memory.sums[threadIdx.x] = 0;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_logical * kWords; i += blockDim.x) hosts[i] = 0;
  __syncthreads();
  LoadHomes(p, sources, in, memory);
  WriteHomes(p, memory, blocks, width, out);
  blocks.AwaitOthers();
  const int2 loads = MeanAndMost<kWords>(p, memory);
  const int32_t mean = loads.x;
  const int32_t most = loads.y;

  // Attempt number i is made by warp i % n_attempts of block i / n_attempts % n_blocks.
  const int32_t at_once = shape.n_blocks * shape.n_attempts;
  if (warp < shape.n_attempts) {
#pragma unroll 1
    for (int32_t i = blocks.index * shape.n_attempts + warp; i < kNTargets; i += at_once) {
      const int32_t n = Attempt<kWords>(p, memory, TargetOf(i, mean, most), fan_out);
      if (lane < blocks.n) blocks.Of(lane, memory.copies)[i] = n;
      __syncwarp();
    }
  }
  blocks.Sync();
  const int32_t best = ChooseAttempt(memory.copies, mean, most);
  if (blocks.index != best / shape.n_attempts % shape.n_blocks) return;
  const int32_t winner = best % shape.n_attempts;
  if (best + at_once < kNTargets) {  // Its warp has made another attempt since.
    if (warp == winner) Attempt<kWords>(p, memory, TargetOf(best, mean, most), fan_out);
    __syncthreads();
  }
  WriteCopies<kWords>(p, CopiesMemory(p, winner, words), width, hosts, out);
}

int64_t Bytes(const Problem& p, int32_t n_attempts) {
  const int64_t words = p.n_logical * GraphWords(p.ep_size) + CopiesMemory::Words(p, n_attempts);
  return words * static_cast<int64_t>(sizeof(int32_t));
}

// Four attempts a block, one for every scheduler; all in one block where there are no clusters.
AttemptShape ChooseShape(const Problem& p, const Device& device) {
  AttemptShape shape = {device.largest_cluster >= 8 ? 8 : 1, kNTargets};
  shape.n_attempts = kNTargets / shape.n_blocks;
  while (shape.n_attempts > 1 && Bytes(p, shape.n_attempts) > device.shared_bytes) {
    shape.n_attempts /= 2;
  }
  return shape;
}

}  // namespace

int64_t PlaceCopiesBytes(const Problem& problem) { return Bytes(problem, 1); }

cudaError_t LaunchPlaceCopies(const Problem& problem, const Sources& sources, int64_t batch,
                              const SolveOperands& in, int32_t fan_out, int32_t width,
                              const CopiesResults& out, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = CurrentDevice(&device);
  if (error != cudaSuccess) return error;
  const AttemptShape shape = ChooseShape(problem, device);
  LaunchShape launch = {};
  launch.grid = dim3(static_cast<unsigned>(batch * shape.n_blocks));
  // A warp for every rank, as LoadHomes has it.
  launch.threads =
      std::max(std::clamp(32 * problem.ep_size, 256, kMostThreads), 32 * shape.n_attempts);
  launch.shared_bytes = Bytes(problem, shape.n_attempts);
  launch.cluster = shape.n_blocks > 1 ? shape.n_blocks : 0;
  return WithGraphWords(problem, [&](auto words) {
    return Launch(PlaceCopiesKernel<decltype(words)::value>, launch, stream, problem, sources, in,
                  fan_out, width, shape, out);
  });
}

}  // namespace lplb::cuda
