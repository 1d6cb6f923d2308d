// Sharing counts between ranks, as device functions that the kernels compose.
#ifndef LPLB_CUDA_SYNC_CUH_
#define LPLB_CUDA_SYNC_CUH_

#include "cuda/sync.h"

namespace lplb::cuda {

constexpr int kSourcesAtOnce = 8;  // Words that a thread has in flight.

__device__ __forceinline__ void StoreWord(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ void StoreWord(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t LoadWord(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

// What was written before the word that it returns is visible afterwards.
__device__ __forceinline__ uint64_t LoadAcquired(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t LoadAcquired(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ int64_t Nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Between two looks at the clock, which take longer than looking again for what is awaited.
constexpr uint32_t kLooks = 64;

// How long a thread, or a block, waits for other ranks: the timeout counts from the first question,
// whatever is awaited then. Initially zero.
class Patience {
 public:
  __device__ __forceinline__ bool Lasts(int64_t timeout_ns) {
    const int64_t now = Nanoseconds();
    if (deadline_ == 0) deadline_ = now + timeout_ns;
    return now < deadline_;
  }

 private:
  int64_t deadline_;
};

// One call, as the threads of a rank see it.
struct SyncCall {
  uint32_t epoch;
  bool failed;                // earlier, or because the program gives this rank another number
  mutable Patience patience;  // of this thread

  // The offset of `source`'s row in an inbox.
  __device__ __forceinline__ int64_t RowOf(const Peers& peers, int32_t source) const {
    return (static_cast<int64_t>(epoch & 1) * peers.size + source) * peers.stride;
  }
};

// Keeps the first failure: only one thread of all blocks reports.
__device__ __forceinline__ void Report(const Peers& peers, SyncFailure failure, uint32_t epoch,
                                       int32_t peer) {
  if (atomicExch(&peers.state->failed, 1) != 0) return;
  volatile SyncReport* report = peers.report;
  report->rank = peers.rank;
  report->peer = peer;
  report->epoch = epoch;
  __threadfence_system();
  report->failure = static_cast<int32_t>(failure);
}

// Begins call number `epoch`. state->epoch must not be raised to it before all threads are past
// here.
__device__ __forceinline__ SyncCall BeginSync(const Peers& peers, uint32_t epoch, int32_t rank,
                                              bool leader) {
  const volatile SyncState* state = peers.state;
  const SyncCall call = {epoch, state->failed != 0 || rank != peers.rank};
  if (leader && threadIdx.x == 0 && rank != peers.rank) {
    Report(peers, SyncFailure::kWrongRank, epoch, rank);
  }
  return call;
}

// `count` as a rank sends it, which may have `failed`, see Peers.
__device__ __forceinline__ uint64_t WordOf(uint32_t epoch, bool failed, int32_t count) {
  return static_cast<uint64_t>(failed ? ~epoch : epoch) << 32 | static_cast<uint32_t>(count);
}
__device__ __forceinline__ bool IsOfFailed(uint64_t word, uint32_t epoch) {
  return static_cast<uint32_t>(word >> 32) == ~epoch;
}

// Sends count i to the rank with this inbox.
__device__ __forceinline__ void Send(const Peers& peers, const SyncCall& call, uint64_t* inbox,
                                     int32_t i, int32_t count) {
  StoreWord(inbox + call.RowOf(peers, peers.rank) + i, WordOf(call.epoch, call.failed, count));
}

// Calls `use(source, count)` for count i of ranks first … first + n − 1 once they have arrived. If
// `beside` is not null, it also awaits that word and calls `use_beside(count)`. Returns false if a
// count does not arrive in time, or comes from a rank that has failed. The leader block gives up a
// second before the others, so no block can fail unless the leader does.
template <typename Use, typename UseBeside>
__device__ __forceinline__ bool Receive(const Peers& peers, const SyncCall& call, int32_t i,
                                        int32_t first, int32_t n, bool leader, const Use& use,
                                        const uint64_t* beside, const UseBeside& use_beside) {
  if (call.failed) return false;
  const auto has_come = [&](uint64_t word) {
    return static_cast<uint32_t>(word >> 32) == call.epoch;
  };
#pragma unroll 1
  for (int32_t end = first + n; first < end; first += kSourcesAtOnce) {
    const uint64_t* words = peers.inbox + call.RowOf(peers, first) + i;
    uint64_t word[kSourcesAtOnce];
    uint64_t other = 0;
    for (uint32_t round = 1;; ++round) {
      int32_t missing = -1;
#pragma unroll
      for (int j = 0; j < kSourcesAtOnce; ++j) {
        if (first + j < end) word[j] = LoadWord(words + static_cast<int64_t>(j) * peers.stride);
      }
      if (beside != nullptr) other = LoadWord(beside);
#pragma unroll
      for (int j = 0; j < kSourcesAtOnce; ++j) {
        if (first + j < end && !has_come(word[j])) missing = first + j;
      }
      if (missing < 0 && (beside == nullptr || has_come(other))) break;
      if (round % kLooks != 0) continue;
      const int64_t late = static_cast<int64_t>(missing - first) * peers.stride;
      const bool in_vain = missing >= 0 && IsOfFailed(LoadWord(words + late), call.epoch);
      if (!in_vain && call.patience.Lasts(peers.timeout_ns + (leader ? 0 : 1000000000))) continue;
      if (missing < 0) missing = (beside - peers.inbox) / peers.stride % peers.size;
      const SyncFailure failure = in_vain ? SyncFailure::kPeerFailed : SyncFailure::kTimeout;
      if (leader) Report(peers, failure, call.epoch, missing);
      return false;
    }
#pragma unroll
    for (int j = 0; j < kSourcesAtOnce; ++j) {
      if (first + j < end) use(first + j, static_cast<int32_t>(word[j]));
    }
    if (beside != nullptr) use_beside(static_cast<int32_t>(other));
    beside = nullptr;
  }
  return true;
}

template <typename Use>
__device__ __forceinline__ bool Receive(const Peers& peers, const SyncCall& call, int32_t i,
                                        int32_t first, int32_t n, bool leader, const Use& use) {
  return Receive(peers, call, i, first, n, leader, use, nullptr, [](int32_t) {});
}

// Ends a call of a block that received by itself. If any thread failed, all counts become −1.
__device__ __forceinline__ void FinishSync(const Peers& peers, const SyncCall& call, bool failed,
                                           int32_t n, int32_t* matrix) {
  failed = __syncthreads_or(failed);
  if (threadIdx.x == 0) peers.state->epoch = call.epoch;
  if (!failed) return;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(peers.size) * n; i += blockDim.x) {
    matrix[i] = -1;
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_SYNC_CUH_
