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

// An expert's tokens from all sources, negative ones as 0; 2³¹ where they are more.
__device__ __forceinline__ uint32_t TokensOf(const Sources& sources, const int32_t* loads,
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
  return static_cast<uint32_t>(min(total, int64_t{kInt32Max} + 1));
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
    const int32_t copy = memory.expert[i] < 0 ? ChosenIn(p, memory, i) : -1;
    const int32_t rank = p.by_slots.Quotient(i);
    copies[i] = copy;
    if (copy < 0) continue;
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
  extern __shared__ __align__(16) uint32_t hosts[];  // [n_logical, kWords], then the rest
  const Blocks blocks(shape.n_blocks);
  blocks.Announce();
  const int64_t element = blockIdx.x / shape.n_blocks;
  const SolveOperands in = BatchElement(p, sources, first_in, element);
  const CopiesResults out = {first_out.phy2log + element * p.n_physical,
                             first_out.log2phy + element * (p.n_logical * width),
                             first_out.logcnt + element * p.n_logical};
  const int32_t lane = threadIdx.x & 31;
  int32_t* words = reinterpret_cast<int32_t*>(hosts) + CopiesMemory::RoundUp(p.n_logical * kWords);
  const CopiesMemory memory(p, 0, words);
  const PrefetchedGraph fetched = PrefetchGraph(p, blockDim.x, in.phy2log, in.log2phy);
  const int32_t first = threadIdx.x;
  const uint32_t of_first = first < p.n_logical ? TokensOf(sources, in.loads, first) : 0;
#pragma unroll 1
  for (int32_t i = threadIdx.x; i < p.n_logical * kWords; i += blockDim.x) hosts[i] = 0;
  FindHomes<Block>(p, in.phy2log, in.log2phy, fetched, memory);
  __syncthreads();
  const auto total_of = [&](int32_t e) {
    return e == first ? of_first : TokensOf(sources, in.loads, e);
  };
  LoadHomes<Block>(p, total_of, memory);
  WriteHomes(p, memory, blocks, width, out);
  blocks.AwaitOthers();
  const TargetRange targets = TargetsOf<kWords>(p, memory);
  MakeAttempts<kWords>(p, words, shape, blocks.index, targets, fan_out,
                       [&](int32_t nth, int32_t n_copies) {
                         if (lane < blocks.n) blocks.Of(lane, memory.copies)[nth] = n_copies;
                       });
  blocks.Sync();
  const int32_t best = ChooseAttempt(memory.copies[lane], targets);
  if (blocks.index != shape.BlockOf(best)) return;
  const CopiesMemory won(p, shape.WarpOf(best), words);
  if (shape.IsOverwritten(best)) {
    if (threadIdx.x / 32 == shape.WarpOf(best)) {
      Attempt<kWords>(p, won, targets.Target(best), fan_out);
    }
    __syncthreads();
  }
  WriteCopies<kWords>(p, won, width, hosts, out);
}

int64_t Bytes(const Problem& p, int32_t n_attempts) {
  const int64_t words = CopiesMemory::RoundUp(p.n_logical * GraphWords(p.ep_size)) +
                        CopiesMemory::Words(p, n_attempts);
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
  // A warp for every rank, as FindHomes has it.
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
