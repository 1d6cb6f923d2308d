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

// Shared memory before CopiesMemory: what the attempts result in, and the words after that.
constexpr int32_t kResultWords = 4 * kNTargets + 4;
LPLB_HOST_DEVICE int32_t WordsBefore(const Problem& p) {
  return kResultWords + CopiesMemory::RoundUp(p.n_logical * (GraphWords(p.ep_size) + 1));
}

// The blocks of one batch element. All have the same homes.
struct Blocks {
  int32_t n;
  int32_t index;

  __device__ explicit Blocks(int32_t n_) : n(n_), index(0) {
#if __CUDA_ARCH__ >= 900
    if (n > 1) index = cooperative_groups::this_cluster().block_rank();
#endif
  }

  // All threads call these two, before blocks write to one another.
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

  // And then these: behind the second, all threads see what others wrote to global memory before
  // the first, if they said so. All lanes of a warp say the same. By itself, a block needs a
  // barrier in between.
  __device__ __forceinline__ void Release(bool wrote) const {
#if __CUDA_ARCH__ >= 900
    if (n > 1 && wrote) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    if (n > 1 && !wrote) AnnounceStart();
#endif
  }
  __device__ __forceinline__ void Acquire() const {
#if __CUDA_ARCH__ >= 900
    if (n > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
  }
};

// An expert's tokens from all sources, of which the first gives `first`; negative ones as 0, and
// 2³¹ where they are more.
__device__ __forceinline__ uint32_t TokensOf(const Sources& sources, const int32_t* loads,
                                             int32_t expert, int32_t first) {
  constexpr int kInFlight = 16;  // Rows that are waited for together.
  int64_t total = max(first, 0);
#pragma unroll 1
  for (int32_t begin = 1; begin < sources.n_sources; begin += kInFlight) {
    int32_t load[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int32_t s = begin + i;
      load[i] = s < sources.n_sources ? loads[s * sources.row + expert] : 0;
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) total += max(load[i], 0);
  }
  return static_cast<uint32_t>(min(total, int64_t{kInt32Max} + 1));
}

// Writes the tables as they are without copies, every block a part: its n_threads threads that call
// this, of which `thread` is one. Copies may be written behind a barrier of the blocks.
__device__ __forceinline__ void WriteHomes(const Problem& p, const CopiesMemory& memory,
                                           const Blocks& blocks, int32_t thread, int32_t n_threads,
                                           int32_t width, const CopiesResults& out) {
  const int32_t first = blocks.index * n_threads + thread;
  const int32_t stride = blocks.n * n_threads;
#pragma unroll 1
  for (int32_t i = first; i < p.n_physical; i += stride) {
    out.phy2log[i] = memory.expert[i];
    if (out.tokens != nullptr) out.tokens[i] = memory.tokens[i];
  }
  // A warp has whole rows.
  const int32_t lane = threadIdx.x & 31;
#pragma unroll 2
  for (int32_t e = first / 32; e < p.n_logical; e += stride / 32) {
    const int32_t home = memory.home[e];
    const bool is_home = home >= 0 && home < p.n_physical && memory.expert[home] == e;
#pragma unroll 1
    for (int32_t k = lane; k < width; k += 32) {
      out.log2phy[e * width + k] = k == 0 && is_home ? home : -1;
    }
    if (lane == 0) out.logcnt[e] = is_home;
  }
}

struct PlacedCopy {
  int32_t expert;
  int32_t slot;
  int32_t rank;

  PlacedCopy() = default;
  __device__ __forceinline__ PlacedCopy(const Problem& p, const CopiesMemory& memory, uint2 copy)
      : expert(memory.ExpertOf(copy)), slot(memory.SlotOf(copy)), rank(p.by_slots.Quotient(slot)) {}
};

// Adds the n copies in `memory`, by one block. `hosts` [n_logical, kWords] must be 0, and a barrier
// passed.
template <int kWords>
__device__ __forceinline__ void WriteCopies(const Problem& p, const CopiesMemory& memory, int32_t n,
                                            int32_t width, uint32_t* hosts,
                                            const CopiesResults& out) {
  const int32_t first = threadIdx.x;
  PlacedCopy mine = {};  // This thread's first, often the only one.
#pragma unroll 1
  for (int32_t i = first; i < n; i += blockDim.x) {
    const uint2 copy = memory.chosen[i];
    const PlacedCopy placed(p, memory, copy);
    if (i == first) mine = placed;
    atomicOr(&hosts[placed.expert * kWords + (placed.rank >> 5)], 1u << (placed.rank & 31));
    out.phy2log[placed.slot] = placed.expert;
    if (out.tokens == nullptr) continue;
    out.tokens[placed.slot] = memory.TokensOf(copy);
    atomicAdd(&out.tokens[memory.HomeOf(copy)], -memory.TokensOf(copy));
  }
  __syncthreads();
#pragma unroll 1
  for (int32_t i = first; i < n; i += blockDim.x) {
    const PlacedCopy placed = i == first ? mine : PlacedCopy(p, memory, memory.chosen[i]);
    const uint32_t* of_expert = hosts + placed.expert * kWords;
    const int32_t place = 1 + PlaceOf<kWords>(of_expert, placed.rank);
    // There is room unless other experts have no home, as in a table that contradicts itself.
    if (place < width) out.log2phy[placed.expert * width + place] = placed.slot;
    int32_t n_hosts = 1;
#pragma unroll
    for (int w = 0; w < kWords; ++w) n_hosts += __popc(of_expert[w]);
    if (place == 1) out.logcnt[placed.expert] = n_hosts;
  }
}

template <int kWords>
__global__ void __launch_bounds__(kMostThreads, 1)
    PlaceCopiesKernel(Problem p, Sources sources, SolveOperands first_in, int32_t fan_out,
                      int32_t width, AttemptShape shape, CopiesResults first_out) {
  extern __shared__ uint4 results[];  // [kNTargets], then the rest
  auto* arrivals = reinterpret_cast<uint64_t*>(results + kNTargets);
  const AttemptResults shared = {results, nullptr, 0, arrivals};
  uint32_t* hosts = reinterpret_cast<uint32_t*>(results) + kResultWords;  // [n_logical, kWords]
  const Blocks blocks(shape.n_blocks);
  const int64_t element = blockIdx.x / shape.n_blocks;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const CopiesResults out = {
      first_out.phy2log + element * p.n_physical,
      first_out.log2phy + element * (p.n_logical * width), first_out.logcnt + element * p.n_logical,
      first_out.tokens != nullptr ? first_out.tokens + element * p.n_physical : nullptr};
  uint32_t* total = hosts + p.n_logical * kWords;  // [n_logical]
  int32_t* words = reinterpret_cast<int32_t*>(results) + WordsBefore(p);
  const CopiesMemory memory(p, 0, words);
  const int32_t expert = threadIdx.x;
  const int32_t load = expert < p.n_logical ? in.loads[expert] : 0;
  const PrefetchedGraph fetched = PrefetchGraph(p, blockDim.x, in.phy2log, in.log2phy);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0 && shape.n_blocks > 1) InitArrivals(arrivals);
#endif
  blocks.Announce();
#pragma unroll 1
  for (int32_t e = expert; e < p.n_logical; e += blockDim.x) {
    total[e] = TokensOf(sources, in.loads, e, e == expert ? load : in.loads[e]);
  }
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_logical * kWords; i += blockDim.x) hosts[i] = 0;
  FindHomes<Block>(p, in.phy2log, in.log2phy, fetched, memory);
#if __CUDA_ARCH__ >= 900
  // Here, since right behind the other, compute-sanitizer's racecheck warns of it.
  if (threadIdx.x == 0 && shape.n_blocks > 1) {
    ExpectBytes(arrivals, shared.Bytes());
  }
#endif
  LoadHomes<Block>(p, [&](int32_t e) { return total[e]; }, memory);
  blocks.AwaitOthers();
  const Targets targets = TargetsOf<kWords>(p, memory);
  // Warps that make no attempt write, if there are any. Meanwhile the others do not wait for it.
  const int32_t busy =
      static_cast<int32_t>(blockDim.x) > 32 * shape.n_attempts ? 32 * shape.n_attempts : 0;
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - busy;
  const bool writes = 32 * WarpIndex() >= busy;
  if (writes) WriteHomes(p, memory, blocks, thread, blockDim.x - busy, width, out);
  blocks.Release(writes);
  const BestAttempt best =
      MakeAttempts<kWords, Block>(p, words, shape, blocks.index, targets, fan_out, shared);
  blocks.Acquire();
  if (blocks.index != shape.BlockOf(best.nth)) return;
  const CopiesMemory won(p, shape.WarpOf(best.nth), words);
  WriteCopies<kWords>(p, won, best.n_copies, width, hosts, out);
}

int64_t Bytes(const Problem& p, int32_t n_attempts) {
  const int64_t words = WordsBefore(p) + CopiesMemory::Words(p, n_attempts);
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
  // A thread for every expert: more only slow the attempts down.
  const int32_t threads = std::clamp((problem.n_logical + 31) / 32 * 32, 256, kMostThreads);
  launch.threads = std::max(threads, 32 * shape.n_attempts);
  launch.shared_bytes = Bytes(problem, shape.n_attempts);
  launch.cluster = shape.n_blocks > 1 ? shape.n_blocks : 0;
  return WithGraphWords(problem, [&](auto words) {
    return Launch(PlaceCopiesKernel<decltype(words)::value>, launch, stream, problem, sources, in,
                  fan_out, width, shape, out);
  });
}

}  // namespace lplb::cuda
