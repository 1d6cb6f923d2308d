// One block per tile of tokens, and one for everything that does not depend on tokens. Every block
// reads all counts: at 64 ranks they take about 100 KiB, and exchanging sums would take longer.
#include <algorithm>

#include "cuda/exchange_plan.h"
#include "cuda/launch.cuh"
#include "cuda/sync.cuh"
#include "cuda/warp.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kMostThreads = 1024;
constexpr int32_t kLeastThreads = 256;  // This many threads sum the counts.
constexpr int32_t kMostWarps = kMostThreads / 32;

__device__ __forceinline__ int32_t Warp() { return static_cast<int32_t>(threadIdx.x) / 32; }
__device__ __forceinline__ int32_t Warps() { return static_cast<int32_t>(blockDim.x) / 32; }

__device__ __forceinline__ uint32_t LanesBefore() { return (1u << Lane()) - 1; }

__device__ __forceinline__ int32_t SumOfLanesUpTo(int32_t value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, value, step);
    if (Lane() >= step) value += before;
  }
  return value;
}

// Row counts per slot, over the slots of all ranks; in shared memory.
struct SlotTable {
  int32_t* total;   // from all sources
  int32_t* mine;    // from this one
  int32_t* before;  // from the sources before this one
  int32_t* start;   // where they begin on the slot's rank; −1 for slots without a group

  __device__ __forceinline__ SlotTable(int32_t* memory, int32_t n)
      : total(memory), mine(memory + n), before(memory + 2 * n), start(memory + 3 * n) {}
  __host__ __device__ static int64_t Words(int64_t n) { return 4 * n; }
};

// The counts of all ranks. `ForSources` calls `use(source, count)` for each source of a slot, in
// order.
class Gathered {
 public:
  __device__ __forceinline__ Gathered(const Peers&, const PlanArguments& in, bool)
      : counts_(in.counts), n_ranks_(in.n_ranks), n_(in.n_ranks * in.n_slots) {}
  __device__ __forceinline__ void Send() const {}
  __device__ __forceinline__ void Finish() const {}

  template <typename Use>
  __device__ __forceinline__ void ForSources(int32_t slot, const Use& use) const {
    for (int32_t first = 0; first < n_ranks_; first += kSourcesAtOnce) {
      int32_t counts[kSourcesAtOnce];
#pragma unroll
      for (int j = 0; j < kSourcesAtOnce; ++j) {
        const int64_t at = static_cast<int64_t>(first + j) * n_ + slot;
        if (first + j < n_ranks_) counts[j] = __ldg(counts_ + at);
      }
#pragma unroll
      for (int j = 0; j < kSourcesAtOnce; ++j) {
        if (first + j < n_ranks_) use(first + j, counts[j]);
      }
    }
  }

 private:
  const int32_t* counts_;
  int32_t n_ranks_;
  int32_t n_;
};

// The same interface for counts as they arrive from other ranks. Every block waits for them itself.
// They stay in place until the next call.
class Arriving {
 public:
  __device__ __forceinline__ Arriving(const Peers& peers, const PlanArguments& in, bool leader)
      : peers_(peers),
        counts_(in.counts),
        n_(in.n_ranks * in.n_slots),
        leader_(leader),
        call_(BeginSync(peers, peers.state->epoch + 1, *in.rank, leader)) {}

  // Called by the leading block of the first kernel.
  __device__ __forceinline__ void Send() const {
    for (int32_t i = threadIdx.x; i < n_; i += blockDim.x) {
      const int32_t count = __ldg(counts_ + i);
      for (int32_t peer = 0; peer < peers_.size; ++peer) {
        lplb::cuda::Send(peers_, call_, peers_.inboxes[peer], i, count);
      }
    }
  }
  // After a failure, missing sources contribute no rows.
  template <typename Use>
  __device__ __forceinline__ void ForSources(int32_t slot, const Use& use) const {
    Receive(peers_, call_, slot, 0, peers_.size, leader_, use);
  }
  // Called at the end of each block of the last kernel. Once every block has got here, all have
  // read the epoch, and the call is complete.
  __device__ __forceinline__ void Finish() const {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&peers_.state->ticket, 1u) != gridDim.x - 1) return;
    peers_.state->ticket = 0;
    peers_.state->epoch = call_.epoch;
  }

 private:
  const Peers& peers_;
  const int32_t* counts_;
  int32_t n_;
  bool leader_;
  SyncCall call_;
};

// The slot of a rank's group, numbered over all ranks; −1 for none.
__device__ __forceinline__ int32_t SlotOfGroup(const PlanArguments& in, int32_t rank,
                                               int32_t group) {
  if (group >= in.n_groups) return -1;
  const int32_t slot = __ldg(in.groups + rank * in.n_groups + group);
  return slot >= 0 && slot < in.n_slots ? rank * in.n_slots + slot : -1;
}

template <typename Counts>
__device__ __forceinline__ void FillTable(const PlanArguments& in, const Counts& counts, int32_t me,
                                          const SlotTable& table) {
  const int32_t first_slot = Warp() < in.n_ranks ? SlotOfGroup(in, Warp(), Lane()) : -1;
  for (int32_t slot = threadIdx.x; slot < in.n_ranks * in.n_slots; slot += blockDim.x) {
    int32_t total = 0, mine = 0, before = 0;
    counts.ForSources(slot, [&](int32_t source, int32_t count) {
      if (source == me) mine = count;
      if (source < me) before += count;
      total += count;
    });
    table.total[slot] = total;
    table.mine[slot] = mine;
    table.before[slot] = before;
    table.start[slot] = -1;
  }
  __syncthreads();
  for (int32_t rank = Warp(); rank < in.n_ranks; rank += Warps()) {
    int32_t end = 0;
    for (int32_t group = Lane(); group - Lane() < in.n_groups; group += 32) {
      const bool loaded = rank == Warp() && group == Lane();
      const int32_t slot = loaded ? first_slot : SlotOfGroup(in, rank, group);
      const int32_t rows = slot < 0 ? 0 : table.total[slot];
      const int32_t up_to = SumOfLanesUpTo(rows);
      if (slot >= 0) table.start[slot] = end + up_to - rows;
      end += __shfl_sync(kFullWarp, up_to, 31);
    }
  }
  __syncthreads();
}

// One lane's choice, as given. A warp takes as many whole tokens as fit in its lanes.
struct Given {
  int32_t slot = -1;
  int32_t position = 0;
};

struct Tile {
  int32_t begin;  // tokens
  int32_t end;
  int32_t per_warp;
  int32_t per_round;

  __device__ __forceinline__ Tile(const PlanArguments& in, int32_t number) {
    const int32_t length = (in.n_tokens + in.n_tiles - 1) / in.n_tiles;
    begin = min(number * length, in.n_tokens);
    end = min(begin + length, in.n_tokens);
    per_warp = 32 / in.top_k;
    per_round = per_warp * Warps();
  }
  // The index of a lane's choice in the round that begins at token `first`; −1 for none.
  __device__ __forceinline__ int64_t ChoiceAt(const PlanArguments& in, int32_t first) const {
    const int32_t in_warp = Lane() / in.top_k;
    const int32_t token = first + Warp() * per_warp + in_warp;
    if (in_warp >= per_warp || token >= end) return -1;
    return static_cast<int64_t>(token) * in.top_k + Lane() % in.top_k;
  }
  __device__ __forceinline__ Given Load(const PlanArguments& in, int32_t first) const {
    const int64_t choice = ChoiceAt(in, first);
    if (choice < 0) return {};
    return {__ldg(in.slot + choice), __ldg(in.position + choice)};
  }
};

// The destination of a lane's choice; −1 for none.
struct Goal {
  int32_t rank = -1;
  int32_t row = -1;
};

__device__ __forceinline__ Goal GoalOf(const PlanArguments& in, const SlotTable& table,
                                       const Given& given) {
  if (given.slot < 0 || given.slot >= in.n_ranks * in.n_slots) return {};
  const int32_t start = table.start[given.slot];
  const int32_t place = start + table.before[given.slot] + given.position;
  const bool counted = given.position >= 0 && given.position < table.mine[given.slot];
  if (start < 0 || !counted || place >= in.capacity) return {};
  const int32_t rank = given.slot / in.n_slots;
  return {rank, rank * in.capacity + place};
}

// A token is sent to another rank at its first choice there.
struct Leaving {
  bool leaves;
  int32_t before;  // This warp's earlier tokens for the same rank,
  int32_t all;     // and all of them.
};

__device__ __forceinline__ Leaving LeavingOf(const PlanArguments& in, const Goal& goal,
                                             int32_t me) {
  const bool other = goal.rank >= 0 && goal.rank != me;
  const int32_t token_and_rank = Lane() / in.top_k * in.n_ranks + goal.rank;
  const uint32_t same_token = __match_any_sync(kFullWarp, other ? token_and_rank : -1);
  const bool leaves = other && (same_token & LanesBefore()) == 0;
  const uint32_t same_rank = __match_any_sync(kFullWarp, leaves ? goal.rank : -1);
  return {leaves, __popc(same_rank & LanesBefore()), __popc(same_rank)};
}

// Counts the tokens of each tile that leave for each rank.
template <typename Counts>
__global__ void __launch_bounds__(kMostThreads, 1)
    CountTilesKernel(const Peers peers, const PlanArguments in) {
  extern __shared__ int32_t memory[];
  const Counts counts(peers, in, blockIdx.x == 0);
  if (blockIdx.x == 0) counts.Send();
  const int32_t n_all_slots = in.n_ranks * in.n_slots;
  const SlotTable table(memory, n_all_slots);
  int32_t* sizes = memory + SlotTable::Words(n_all_slots);
  for (int32_t rank = threadIdx.x; rank < in.n_ranks; rank += blockDim.x) sizes[rank] = 0;
  const int32_t me = *in.rank;
  FillTable(in, counts, me, table);
  const Tile tile(in, blockIdx.x);
  for (int32_t first = tile.begin; first < tile.end; first += tile.per_round) {
    const Goal goal = GoalOf(in, table, tile.Load(in, first));
    const Leaving leaving = LeavingOf(in, goal, me);
    if (leaving.leaves && leaving.before == 0) atomicAdd(&sizes[goal.rank], leaving.all);
  }
  __syncthreads();
  for (int32_t rank = threadIdx.x; rank < in.n_ranks; rank += blockDim.x) {
    in.workspace[blockIdx.x * in.n_ranks + rank] = sizes[rank];
  }
}

// Tokens that leave for each rank: before a round of a tile, and by each warp in that round. There
// are two of these, used in turn: the next is filled while the current one is read.
struct Before {
  int32_t* round;  // [n_ranks]
  int32_t* warps;  // [kMostWarps, n_ranks]

  __device__ __forceinline__ Before(int32_t* memory, int32_t n_ranks, int32_t turn)
      : round(memory + (turn & 1) * Words(n_ranks) / 2), warps(round + n_ranks) {}
  __host__ __device__ static int64_t Words(int64_t n_ranks) {
    return 2 * (kMostWarps + 1) * n_ranks;
  }
  __device__ __forceinline__ void ClearWarps(int32_t n_ranks) const {
    for (int32_t i = threadIdx.x; i < Warps() * n_ranks; i += blockDim.x) warps[i] = 0;
  }
  // Tokens of warps 0 … n − 1 of the round, plus all before it.
  __device__ __forceinline__ int32_t Sum(int32_t n_ranks, int32_t rank, int32_t n) const {
    int32_t sum = round[rank];
    for (int32_t warp = 0; warp < n; ++warp) sum += warps[warp * n_ranks + rank];
    return sum;
  }
};

template <typename Counts>
__device__ __forceinline__ void PlanTokens(const PlanArguments& in, const Counts& counts,
                                           const SlotTable& table, int32_t* memory,
                                           int32_t number) {
  const Tile tile(in, number);
  Given next = tile.Load(in, tile.begin);
  const int32_t me = *in.rank;
  const Before at_first(memory, in.n_ranks, 0);
  at_first.ClearWarps(in.n_ranks);
  for (int32_t rank = threadIdx.x; rank < in.n_ranks; rank += blockDim.x) {
    int32_t sum = 0;
    for (int32_t earlier = 0; earlier < number; ++earlier) {
      sum += __ldg(in.workspace + earlier * in.n_ranks + rank);
    }
    at_first.round[rank] = sum;
  }
  FillTable(in, counts, me, table);
  int32_t round = 0;
  for (int32_t first = tile.begin; first < tile.end; first += tile.per_round, ++round) {
    const Before before(memory, in.n_ranks, round);
    const Before of_next(memory, in.n_ranks, round + 1);
    const Goal goal = GoalOf(in, table, next);
    next = tile.Load(in, first + tile.per_round);
    const Leaving leaving = LeavingOf(in, goal, me);
    if (leaving.leaves && leaving.before == 0) {
      before.warps[Warp() * in.n_ranks + goal.rank] = leaving.all;
    }
    __syncthreads();
    const int64_t choice = tile.ChoiceAt(in, first);
    if (choice >= 0) {
      in.row[choice] = goal.row;
      in.order[choice] =
          leaving.leaves ? before.Sum(in.n_ranks, goal.rank, Warp()) + leaving.before : -1;
    }
    for (int32_t rank = threadIdx.x; rank < in.n_ranks; rank += blockDim.x) {
      of_next.round[rank] = before.Sum(in.n_ranks, rank, Warps());
    }
    of_next.ClearWarps(in.n_ranks);
    __syncthreads();
  }
  if (number + 1 < in.n_tiles) return;
  const Before all(memory, in.n_ranks, round);
  for (int32_t rank = threadIdx.x; rank < in.n_ranks; rank += blockDim.x) {
    in.lists[kSizesSent * in.n_ranks + rank] = all.round[rank];
  }
}

// Upper bounds on the tokens between each pair of ranks, which all ranks can compute: the number of
// rows, and at most the source's tokens.
class Rooms {
 public:
  __device__ __forceinline__ Rooms(const PlanArguments& in, int32_t* memory)
      : rows_(memory), n_ranks_(in.n_ranks), most_(in.n_tokens) {}
  __host__ __device__ static int64_t Words(int64_t n_ranks) { return n_ranks * (n_ranks | 1); }

  __device__ __forceinline__ void Clear() const {
    for (int32_t i = threadIdx.x; i < Words(n_ranks_); i += blockDim.x) rows_[i] = 0;
  }
  __device__ __forceinline__ void Add(int32_t source, int32_t rank, int32_t rows) const {
    if (source != rank && rows > 0) atomicAdd(&rows_[At(source, rank)], rows);
  }
  __device__ __forceinline__ int32_t Of(int32_t source, int32_t rank) const {
    return min(rows_[At(source, rank)], most_);
  }

 private:
  // An odd row length avoids bank conflicts between threads that read down a column.
  __device__ __forceinline__ int32_t At(int32_t source, int32_t rank) const {
    return source * (n_ranks_ | 1) + rank;
  }

  int32_t* rows_;
  int32_t n_ranks_;
  int32_t most_;
};

__device__ __forceinline__ void SumOverflow(const PlanArguments& in, const SlotTable& table,
                                            int32_t* sum) {
  for (int32_t rank = Warp(); rank < in.n_ranks; rank += Warps()) {
    int32_t rows = 0;
    for (int32_t slot = Lane(); slot < in.n_slots; slot += 32) {
      rows += table.total[rank * in.n_slots + slot];
    }
    rows = __reduce_add_sync(kFullWarp, rows);
    if (Lane() == 0 && rows > in.capacity) atomicAdd(sum, rows - in.capacity);
  }
}

__device__ __forceinline__ void WriteStarts(const PlanArguments& in, const Rooms& rooms,
                                            int32_t me) {
  for (int32_t rank = threadIdx.x; rank < in.n_ranks; rank += blockDim.x) {
    int32_t there = 0, here = 0, home = 0, home_again = 0;
    for (int32_t source = 0; source < me; ++source) {
      there += rooms.Of(source, rank);
      home += rooms.Of(rank, source);
    }
    for (int32_t source = 0; source < rank; ++source) {
      here += rooms.Of(source, me);
      home_again += rooms.Of(me, source);
    }
    in.lists[kStartsThere * in.n_ranks + rank] = there;
    in.lists[kStartsHere * in.n_ranks + rank] = here;
    in.lists[kStartsHome * in.n_ranks + rank] = home;
    in.lists[kStartsReturn * in.n_ranks + rank] = home_again;
  }
}

// Everything that does not depend on tokens.
template <typename Counts>
__device__ __forceinline__ void PlanLists(const PlanArguments& in, const Counts& counts,
                                          const SlotTable& table, int32_t* memory) {
  __shared__ int32_t overflow;
  if (threadIdx.x == 0) overflow = 0;
  const Rooms rooms(in, memory);
  rooms.Clear();
  const int32_t me = *in.rank;
  FillTable(in, counts, me, table);
  for (int32_t slot = threadIdx.x; slot < in.n_ranks * in.n_slots; slot += blockDim.x) {
    in.slot_loads[slot] = table.total[slot];
    int32_t end = table.start[slot];
    if (end < 0) continue;
    counts.ForSources(slot, [&](int32_t source, int32_t count) {
      rooms.Add(source, slot / in.n_slots, min(count, in.capacity - end));
      end += count;
    });
  }
  for (int32_t group = threadIdx.x; group < in.n_groups; group += blockDim.x) {
    const int32_t slot = SlotOfGroup(in, me, group);
    const int32_t rows = slot < 0 ? 0 : min(table.total[slot], in.capacity - table.start[slot]);
    in.group_sizes[group] = max(rows, 0);
  }
  SumOverflow(in, table, &overflow);
  __syncthreads();
  if (threadIdx.x == 0) *in.overflow = overflow;
  WriteStarts(in, rooms, me);
}

template <typename Counts>
__global__ void __launch_bounds__(kMostThreads, 1)
    PlanKernel(const Peers peers, const PlanArguments in) {
  extern __shared__ int32_t memory[];
  const int32_t n_all_slots = in.n_ranks * in.n_slots;
  const SlotTable table(memory, n_all_slots);
  int32_t* rest = memory + SlotTable::Words(n_all_slots);
  // The first block sends, so a waiting block only ever waits for a running one.
  const Counts counts(peers, in, blockIdx.x == 0);
  if (blockIdx.x > 0) {
    PlanTokens(in, counts, table, rest, static_cast<int32_t>(blockIdx.x) - 1);
  } else {
    if (in.n_tiles == 1) counts.Send();  // Otherwise the first kernel has sent them.
    PlanLists(in, counts, table, rest);
  }
  counts.Finish();
}

int32_t ThreadsFor(const PlanArguments& arguments) {
  const int32_t tokens = (arguments.n_tokens + arguments.n_tiles - 1) / arguments.n_tiles;
  const int32_t per_warp = 32 / arguments.top_k;
  return std::clamp((tokens + per_warp - 1) / per_warp * 32, kLeastThreads, kMostThreads);
}

template <typename Counts>
cudaError_t LaunchWith(const Peers& peers, const PlanArguments& arguments, cudaStream_t stream) {
  LaunchShape shape = {dim3(arguments.n_tiles), ThreadsFor(arguments)};
  shape.shared_bytes = PlanSharedBytes(arguments.n_ranks, arguments.n_slots);
  if (arguments.n_tiles > 1) {
    const cudaError_t error = Launch(CountTilesKernel<Counts>, shape, stream, peers, arguments);
    if (error != cudaSuccess) return error;
  }
  shape.grid = dim3(arguments.n_tiles + 1);
  return Launch(PlanKernel<Counts>, shape, stream, peers, arguments);
}

}  // namespace

int64_t PlanSharedBytes(int64_t n_ranks, int64_t n_slots) {
  const int64_t rest = std::max(Before::Words(n_ranks), Rooms::Words(n_ranks));
  return (SlotTable::Words(n_ranks * n_slots) + rest) * static_cast<int64_t>(sizeof(int32_t));
}

cudaError_t LaunchPlan(const PlanArguments& arguments, cudaStream_t stream) {
  return LaunchWith<Gathered>({}, arguments, stream);
}

cudaError_t LaunchSyncedPlan(const Peers& peers, const PlanArguments& arguments,
                             cudaStream_t stream) {
  return LaunchWith<Arriving>(peers, arguments, stream);
}

cudaError_t PreloadPlan() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(CountTilesKernel<Arriving>),
                             reinterpret_cast<const void*>(PlanKernel<Arriving>)}) {
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lplb::cuda
