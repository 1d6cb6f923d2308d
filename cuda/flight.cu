// The kernels around the copy engines' work: waiting, raising words, and taking what came.
#include <algorithm>

#include "cuda/flight.h"
#include "cuda/launch.cuh"
#include "cuda/sync.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kTakeThreads = 512;
constexpr int32_t kTakeWords = 4;  // of 16 bytes, that a thread has in flight
constexpr int32_t kMostTakeBlocks = 1024;

enum class Word : int32_t { kArrived, kFreed, kSpoiled };

__device__ __forceinline__ HangarHeader* HeaderOf(char* hangar) {
  return reinterpret_cast<HangarHeader*>(hangar);
}

__device__ __forceinline__ uint32_t* WordsOf(char* hangar, Word word) {
  if (word == Word::kSpoiled) return HeaderOf(hangar)->spoiled;
  return word == Word::kArrived ? HeaderOf(hangar)->arrived : HeaderOf(hangar)->freed;
}

// No kernel can call off the engines' copies, which follow on the stream. So a receiver whose place
// was not free hears beforehand that its bytes may get mixed.
__device__ void GiveUp(const Hangars& hangars, int32_t rank, Word word) {
  if (word != Word::kFreed) return;
  StoreWord(WordsOf(hangars.all[rank], Word::kSpoiled) + hangars.peers.rank, 1);
  __threadfence_system();
}

// One thread per rank.
__global__ void AwaitKernel(const Hangars hangars, const FlightRanks ranks, Word word,
                            uint32_t flight) {
  const int32_t rank = ranks.of[threadIdx.x];
  const uint32_t* awaited = WordsOf(hangars.own, word) + rank;
  const uint32_t* spoiled = WordsOf(hangars.own, Word::kSpoiled) + rank;
  const volatile int32_t* failed = &hangars.peers.state->failed;
  Patience patience = {};
  for (uint32_t round = 1;; ++round) {
    if (static_cast<int32_t>(LoadAcquired(awaited) - flight) >= 0) return;
    if (round % kLooks != 0) continue;
    if (*failed != 0) return GiveUp(hangars, rank, word);
    const bool in_vain = LoadAcquired(spoiled) != 0;
    if (!in_vain && patience.Lasts(hangars.peers.timeout_ns)) continue;
    const SyncFailure failure = in_vain ? SyncFailure::kPeerFailed : SyncFailure::kNoCopies;
    Report(hangars.peers, failure, flight, rank);
    return GiveUp(hangars, rank, word);
  }
}

// The copies before it on the stream have been made. After a failure the ranks hear of that
// instead: what was sent may have been sent to a place that was not free.
__global__ void RaiseKernel(const Hangars hangars, const FlightRanks ranks, Word word,
                            uint32_t flight) {
  const volatile int32_t* failed = &hangars.peers.state->failed;
  if (*failed != 0) {
    word = Word::kSpoiled;
    flight = 1;
  }
  __threadfence_system();
  const bool all = ranks.n == 0;
  const int32_t n = all ? hangars.peers.size : ranks.n;
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) {
    StoreWord(WordsOf(hangars.all[all ? i : ranks.of[i]], word) + hangars.peers.rank, flight);
  }
}

__device__ __forceinline__ float NumberOf(uint32_t flight) {
  return static_cast<float>(flight & 0xffffff);  // Floats hold it exactly.
}

__global__ void NumberKernel(uint32_t flight, float* number) { *number = NumberOf(flight); }

// Whether a rank may have overwritten the place before it was free: any rank, since a later flight
// may come from others than this one. To be called by all threads of a block, after what they read
// there.
__device__ bool Spoiled(const Hangars& hangars, uint32_t flight) {
  static_assert(HangarHeader::kMostRanks <= kTakeThreads);
  const auto rank = static_cast<int32_t>(threadIdx.x);
  bool spoiled = false;
  __syncthreads();
  if (rank < hangars.peers.size) {
    __threadfence_system();
    spoiled = LoadAcquired(WordsOf(hangars.own, Word::kSpoiled) + rank) != 0;
    if (spoiled) Report(hangars.peers, SyncFailure::kPeerFailed, flight, rank);
  }
  return __syncthreads_or(spoiled) != 0;
}

// The share of a block; `from` is null for bits that are all set.
__device__ void TakeShare(const uint4* from, uint4* to, int64_t n) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTakeThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kTakeThreads + threadIdx.x;
  for (; i < n; i += kTakeWords * step) {
    uint4 words[kTakeWords];
#pragma unroll
    for (int j = 0; j < kTakeWords; ++j) {
      words[j] = uint4{~0u, ~0u, ~0u, ~0u};
      if (i + j * step < n && from != nullptr) words[j] = __ldcg(from + i + j * step);
    }
#pragma unroll
    for (int j = 0; j < kTakeWords; ++j) {
      if (i + j * step < n) to[i + j * step] = words[j];
    }
  }
}

__global__ void __launch_bounds__(kTakeThreads)
    TakeKernel(const Hangars hangars, uint32_t flight, const float* number, const uint4* from,
               uint4* to, int64_t n) {
  const volatile int32_t* failed = &hangars.peers.state->failed;
  const bool wrong = *number != NumberOf(flight);
  if (wrong && blockIdx.x == 0 && threadIdx.x == 0) {
    Report(hangars.peers, SyncFailure::kWrongFlight, flight, hangars.peers.rank);
  }
  if (!wrong && *failed == 0) {
    TakeShare(from, to, n);
    if (!Spoiled(hangars, flight)) return;
  }
  TakeShare(nullptr, to, n);
}

cudaError_t Await(const Hangars& hangars, const FlightRanks& ranks, Word word, uint32_t flight,
                  cudaStream_t stream) {
  if (ranks.n == 0) return cudaSuccess;
  return Launch(AwaitKernel, {dim3(1), ranks.n}, stream, hangars, ranks, word, flight);
}

cudaError_t Raise(const Hangars& hangars, const FlightRanks& ranks, Word word, uint32_t flight,
                  cudaStream_t stream) {
  return Launch(RaiseKernel, {dim3(1), 32}, stream, hangars, ranks, word, flight);
}

}  // namespace

cudaError_t LaunchAwaitArrived(const Hangars& hangars, const FlightRanks& ranks, uint32_t flight,
                               cudaStream_t stream) {
  return Await(hangars, ranks, Word::kArrived, flight, stream);
}

cudaError_t LaunchAwaitFreed(const Hangars& hangars, const FlightRanks& ranks, uint32_t flight,
                             cudaStream_t stream) {
  return Await(hangars, ranks, Word::kFreed, flight, stream);
}

cudaError_t LaunchRaiseArrived(const Hangars& hangars, const FlightRanks& ranks, uint32_t flight,
                               cudaStream_t stream) {
  if (ranks.n == 0) return cudaSuccess;
  return Raise(hangars, ranks, Word::kArrived, flight, stream);
}

cudaError_t LaunchRaiseFreed(const Hangars& hangars, uint32_t flight, cudaStream_t stream) {
  return Raise(hangars, {}, Word::kFreed, flight, stream);
}

cudaError_t LaunchNumber(uint32_t flight, float* number, cudaStream_t stream) {
  return Launch(NumberKernel, {dim3(1), 1}, stream, flight, number);
}

cudaError_t LaunchTake(const Hangars& hangars, uint32_t flight, const float* number,
                       const void* from, void* to, int64_t bytes, cudaStream_t stream) {
  const int64_t n = bytes / 16;
  const int64_t blocks = (n + kTakeThreads * kTakeWords - 1) / (kTakeThreads * kTakeWords);
  const LaunchShape shape = {
      dim3(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMostTakeBlocks))), kTakeThreads};
  return Launch(TakeKernel, shape, stream, hangars, flight, number, static_cast<const uint4*>(from),
                static_cast<uint4*>(to), n);
}

cudaError_t PreloadFlights() {
  cudaFuncAttributes attributes;
  for (const void* kernel :
       {reinterpret_cast<const void*>(AwaitKernel), reinterpret_cast<const void*>(RaiseKernel),
        reinterpret_cast<const void*>(NumberKernel), reinterpret_cast<const void*>(TakeKernel)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lplb::cuda
