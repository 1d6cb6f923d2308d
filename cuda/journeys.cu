// One warp per rank orders its slots; one block finds all journeys of a rank. XLA would launch some
// twenty kernels instead, between the counting of tokens and their departure.
#include <algorithm>

#include "cuda/exchange.h"
#include "cuda/journeys.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kMostThreads = 1024;

// Whether a slot or expert of that number exists.
__device__ __forceinline__ bool IsIn(int32_t number, int32_t n) {
  return number >= 0 && number < n;
}

// Takes the numbers of a rank's slots in order, those of one kind, and writes them row by row.
class RowsOfSlots {
 public:
  __device__ __forceinline__ RowsOfSlots(int32_t* rows, int32_t n_rows)
      : rows_(rows), n_rows_(n_rows) {}

  // Called by a whole warp.
  __device__ __forceinline__ void AddIf(bool held, int32_t slot) {
    const uint32_t lanes = __ballot_sync(kFullWarp, held);
    const int32_t row = n_ + __popc(lanes & ((1u << Lane()) - 1));
    if (held && row < n_rows_) rows_[row] = slot;
    n_ += __popc(lanes);
  }
  __device__ __forceinline__ void FillRest(int32_t none) const {
    for (int32_t row = n_ + Lane(); row < n_rows_; row += 32) rows_[row] = none;
  }

 private:
  int32_t* rows_;
  int32_t n_rows_;
  int32_t n_ = 0;
};

__global__ void __launch_bounds__(32) SlotsByRowKernel(const SlotsByRowArguments in) {
  const ExpertSizes& sizes = in.sizes;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * sizes.n_slots;
  int32_t* const rows = in.slots + blockIdx.x * sizes.n_rows;
  RowsOfSlots own(rows, sizes.n_local);
  RowsOfSlots copies(rows + sizes.n_local, sizes.room());
  for (int32_t begin = 0; begin < sizes.n_slots; begin += 32) {
    const int32_t slot = begin + Lane();
    const int32_t expert = slot < sizes.n_slots ? __ldg(in.phy2log + first + slot) : -1;
    const bool is_held = IsIn(expert, sizes.n_logical);
    const bool is_home = is_held && __ldg(in.log2phy + static_cast<int64_t>(expert) *
                                                           in.max_replicas) == first + slot;
    own.AddIf(is_home, slot);
    copies.AddIf(is_held && !is_home, slot);
  }
  own.FillRest(sizes.n_slots);
  copies.FillRest(sizes.n_slots);
}

// All copies of all ranks, by their number: rank by rank. In shared memory.
struct Copies {
  int32_t n;
  int32_t* expert;   // −1 if it has no tokens, or is at home
  int32_t* peer;     // the rank that sends it; −1 if it does not travel
  int32_t* child;    // its number among the copies of its expert
  int32_t* home;     // [n_logical], rank · n_local + row of the expert's home; −1 for none
  int32_t* counts;   // [4, n_ranks]
  int32_t* is_sent;  // [n_local]

  __device__ __forceinline__ Copies(const ExpertSizes& sizes, int32_t* memory)
      : n(sizes.n_ranks * sizes.room()),
        expert(memory),
        peer(expert + n),
        child(peer + n),
        home(child + n),
        counts(home + sizes.n_logical),
        is_sent(counts + 4 * sizes.n_ranks) {}
  static int64_t Bytes(const ExpertSizes& sizes) {
    const int64_t n = int64_t{sizes.n_ranks} * sizes.room();
    return (3 * n + sizes.n_logical + 4 * sizes.n_ranks + sizes.n_local) *
           static_cast<int64_t>(sizeof(int32_t));
  }
  // How many before copy i have the same key.
  __device__ __forceinline__ int32_t Before(int32_t i, const int32_t* keys) const {
    int32_t before = 0;
    for (int32_t j = 0; j < i; ++j) before += keys[j] == keys[i];
    return before;
  }
};

// Calls `use` for each of n numbers, by all threads, and waits for all.
template <typename Use>
__device__ __forceinline__ void ForAll(int32_t n, const Use& use) {
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) use(i);
  __syncthreads();
}

__device__ __forceinline__ void FillHomes(const JourneysArguments& in, const Copies& copies) {
  const ExpertSizes& sizes = in.sizes;
  ForAll(sizes.n_logical, [&](int32_t e) { copies.home[e] = -1; });
  ForAll(sizes.n_ranks * sizes.n_local, [&](int32_t i) {
    const int32_t rank = i / sizes.n_local;
    const int32_t slot = __ldg(in.slots + rank * sizes.n_rows + i - rank * sizes.n_local);
    if (!IsIn(slot, sizes.n_slots)) return;
    const int32_t expert = __ldg(in.phy2log + rank * sizes.n_slots + slot);
    if (IsIn(expert, sizes.n_logical)) copies.home[expert] = i;
  });
}

// Which copies travel, and from where.
__device__ __forceinline__ void FindTravellers(const JourneysArguments& in, const Copies& copies) {
  const ExpertSizes& sizes = in.sizes;
  const int32_t room = sizes.room();
  ForAll(copies.n, [&](int32_t i) {
    const int32_t rank = i / room;
    copies.expert[i] = copies.peer[i] = -1;
    const int32_t slot = __ldg(in.slots + rank * sizes.n_rows + sizes.n_local + i - rank * room);
    if (!IsIn(slot, sizes.n_slots)) return;
    const int32_t at = rank * sizes.n_slots + slot;
    const int32_t expert = __ldg(in.phy2log + at);
    if (!IsIn(expert, sizes.n_logical) || __ldg(in.slot_loads + at) <= 0) return;
    const int32_t home = copies.home[expert];
    if (home < 0 || home / sizes.n_local == rank) return;
    copies.expert[i] = expert;
    copies.peer[i] = home / sizes.n_local;
  });
  ForAll(copies.n, [&](int32_t i) {
    if (copies.peer[i] >= 0) copies.child[i] = copies.Before(i, copies.expert);
  });
  ForAll(copies.n, [&](int32_t i) {
    if (copies.peer[i] >= 0 && copies.child[i] >= in.most) copies.peer[i] = -1;
  });
  // The last ones of a home lose their journey only once all have been counted.
  ForAll(copies.n, [&](int32_t i) {
    if (copies.peer[i] >= 0 && copies.Before(i, copies.peer) >= in.n_received)
      copies.expert[i] = -1;
  });
  ForAll(copies.n, [&](int32_t i) {
    if (copies.expert[i] < 0) copies.peer[i] = -1;
  });
}

// `n` is an array of n_ranks counts.
__device__ __forceinline__ int32_t SumBefore(const int32_t* n, int32_t rank) {
  int32_t sum = 0;
  for (int32_t i = 0; i < rank; ++i) sum += n[i];
  return sum;
}

__global__ void __launch_bounds__(kMostThreads, 1) JourneysKernel(const JourneysArguments in) {
  extern __shared__ int32_t memory[];
  const ExpertSizes& sizes = in.sizes;
  const Copies copies(sizes, memory);
  const int32_t n_ranks = sizes.n_ranks;
  const int32_t room = sizes.room();
  const int32_t me = *in.me;
  int32_t* const to = copies.counts;            // copies that this rank sends to each
  int32_t* const to_before = to + n_ranks;      // and those that ranks before it send there
  int32_t* const from = to_before + n_ranks;    // copies that this rank receives from each
  int32_t* const from_before = from + n_ranks;  // and those that ranks before it receive
  FillHomes(in, copies);
  FindTravellers(in, copies);

  ForAll(4 * n_ranks, [&](int32_t i) { copies.counts[i] = 0; });
  ForAll(sizes.n_local, [&](int32_t row) { copies.is_sent[row] = 0; });
  ForAll(sizes.n_rows * in.most, [&](int32_t i) { in.rank[i] = in.copy[i] = in.order[i] = -1; });
  ForAll(room * in.most, [&](int32_t i) { in.received[i] = -1; });
  ForAll(in.n_sent, [&](int32_t i) { in.sent[i] = sizes.n_rows; });
  ForAll(copies.n, [&](int32_t i) {
    const int32_t peer = copies.peer[i];
    if (peer < 0) return;
    const int32_t rank = i / room;
    if (peer == me) atomicAdd(to + rank, 1);
    if (peer < me) atomicAdd(to_before + rank, 1);
    if (rank == me) atomicAdd(from + peer, 1);
    if (rank < me) atomicAdd(from_before + peer, 1);
    if (peer == me) copies.is_sent[copies.home[copies.expert[i]] - me * sizes.n_local] = 1;
  });

  ForAll(n_ranks, [&](int32_t rank) {
    in.from[rank] = from[rank];
    const int32_t of_rank[kLists] = {to[rank], to_before[rank], SumBefore(from, rank),
                                     from_before[rank], SumBefore(to, rank)};
    for (int32_t list = 0; list < kLists; ++list) in.lists[list * n_ranks + rank] = of_rank[list];
  });
  ForAll(sizes.n_rows, [&](int32_t row) {
    const bool is_sent = row < sizes.n_local && copies.is_sent[row] != 0;
    const int32_t nth = is_sent ? SumBefore(copies.is_sent, row) : in.n_sent;
    in.nth[row] = nth;
    if (nth < in.n_sent) in.sent[nth] = row;
  });
  ForAll(copies.n, [&](int32_t i) {
    const int32_t peer = copies.peer[i];
    const int32_t rank = i / room;
    if (peer < 0 || (peer != me && rank != me)) return;
    const int32_t row = copies.home[copies.expert[i]];
    int32_t order = 0;
    for (int32_t j = rank * room; j < (rank + 1) * room; ++j) {
      order += copies.peer[j] == peer && copies.home[copies.expert[j]] < row;
    }
    const int32_t child = copies.child[i];
    if (peer == me) {
      const int32_t at = (row - me * sizes.n_local) * in.most + child;
      in.rank[at] = rank;
      in.copy[at] = i - rank * room;
      in.order[at] = order;
    }
    if (rank == me)
      in.received[(SumBefore(from, peer) + order) * in.most + child] = i - rank * room;
  });
}

}  // namespace

cudaError_t LaunchSlotsByRow(const SlotsByRowArguments& arguments, cudaStream_t stream) {
  return Launch(SlotsByRowKernel, {dim3(arguments.sizes.n_ranks), 32}, stream, arguments);
}

cudaError_t LaunchJourneys(const JourneysArguments& arguments, cudaStream_t stream) {
  const ExpertSizes& sizes = arguments.sizes;
  const int32_t most = std::max(sizes.n_ranks * sizes.room(), sizes.n_logical);
  const int32_t threads = std::clamp((most + 31) / 32 * 32, 128, kMostThreads);
  return Launch(JourneysKernel, {dim3(1), threads, Copies::Bytes(sizes)}, stream, arguments);
}

cudaError_t PreloadJourneys() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(SlotsByRowKernel),
                             reinterpret_cast<const void*>(JourneysKernel)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lplb::cuda
