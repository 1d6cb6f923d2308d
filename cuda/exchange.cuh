// Exchanges of tokens, as device functions that the kernels of both directions compose.
//
// A warp moves a token, or a piece of one. Blocks take parts in the order in which they start, not
// by their index. The first ones send, so a waiting block only ever waits for running blocks.
// Received items are handed out in the order in which they are sent, so that a warp waits for what
// arrives next; a few at a time, so that it waits once for the flags of all of them, and once for
// what says where they go.
//
// `AnyExchange` is Exchange or PutExchange. What differs is in exchange.cu and
// nvshmem/exchange_put.cu: an Outbox, and the overloads of SendHeader and HasCome.
#ifndef LPLB_CUDA_EXCHANGE_CUH_
#define LPLB_CUDA_EXCHANGE_CUH_

#include "cuda/exchange.h"
#include "cuda/sync.cuh"
#include "cuda/warp.cuh"

namespace lplb::cuda {

constexpr int32_t kMostWarps = 32;  // per block, which has an SM to itself
constexpr int32_t kWord = 16;       // bytes that a lane moves at once

// One exchange, as the threads of a block see it. The pointers are to shared memory.
struct ExchangeCall {
  uint32_t epoch;
  int32_t part;          // this block's: how many blocks started before it
  bool failed;           // earlier, or because the program gives this rank another number
  char** windows;        // [n_ranks]
  const int32_t* lists;  // [kLists, n_ranks], see Routing
  int32_t* sizes;        // [n_ranks], tokens that arrive from each rank
  Patience patience;     // of this block

  __host__ __device__ static int64_t SharedBytes(int64_t n_ranks) {
    return n_ranks * (sizeof(char*) + (kLists + 1) * sizeof(int32_t));
  }
  template <typename AnyExchange>
  __device__ __forceinline__ int32_t ListAt(const AnyExchange& exchange, List list,
                                            int32_t rank) const {
    return lists[list * exchange.shape.n_ranks + rank];
  }
};

// A window's slot, or the one in which what goes there is packed.
template <typename AnyExchange>
struct Slot {
  using Flag = typename decltype(AnyExchange::shape)::Flag;

  char* rows;
  uint64_t* gates;
  uint64_t* headers;
  int32_t* numbers;
  Flag* flags;
};

template <typename AnyExchange>
__device__ __forceinline__ Slot<AnyExchange> SlotAt(const AnyExchange& exchange, char* begin) {
  const auto& shape = exchange.shape;
  return {shape.Rows(begin), reinterpret_cast<uint64_t*>(begin + shape.GatesAt()),
          reinterpret_cast<uint64_t*>(begin + shape.HeadersAt()),
          reinterpret_cast<int32_t*>(begin + shape.NumbersAt()),
          reinterpret_cast<typename Slot<AnyExchange>::Flag*>(begin + shape.FlagsAt())};
}

template <typename AnyExchange>
__device__ __forceinline__ Slot<AnyExchange> SlotOf(const AnyExchange& exchange,
                                                    const ExchangeCall& call, int32_t rank) {
  return SlotAt(exchange, call.windows[rank] + (call.epoch & 1) * exchange.shape.SlotBytes());
}

// Loads a word; 0 if it is not `there`. Bypasses the L1 cache: what a peer has written is
// in L2. Predicated here, since branches around loads cost each of them a register for its address.
__device__ __forceinline__ uint4 LoadWide(const char* address, bool there) {
  uint4 value;
  asm volatile(
      "{.reg .pred there; setp.ne.s32 there, %5, 0;"
      " mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
      " @there ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(address), "r"(static_cast<int32_t>(there))
      : "memory");
  return value;
}
__device__ __forceinline__ void StoreWide(char* address, const uint4& value, bool there) {
  asm volatile(
      "{.reg .pred there; setp.ne.s32 there, %5, 0;"
      " @there st.global.v4.u32 [%4], {%0, %1, %2, %3};}" ::"r"(value.x),
      "r"(value.y), "r"(value.z), "r"(value.w), "l"(address), "r"(static_cast<int32_t>(there))
      : "memory");
}

// Starts a copy of a word to shared memory; nothing if it is not `there`. It bypasses the L1 cache,
// too.
__device__ __forceinline__ void FetchWide(uint4* to, const char* from, bool there) {
  asm volatile(
      "{.reg .pred there; setp.ne.s32 there, %2, 0;"
      " @there cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(static_cast<int32_t>(there))
      : "memory");
}
__device__ __forceinline__ void CommitFetches() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's fetches, except the last `groups` that it has committed.
template <int groups>
__device__ __forceinline__ void AwaitFetches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

__device__ __forceinline__ uint64_t LoadGate(const void* gates, int64_t i, int32_t bytes) {
  if (bytes == 0) return 0;
  if (bytes == 2) return static_cast<const uint16_t*>(gates)[i];
  if (bytes == 4) return static_cast<const uint32_t*>(gates)[i];
  return static_cast<const uint64_t*>(gates)[i];
}
__device__ __forceinline__ void StoreGate(void* gates, int64_t i, int32_t bytes, uint64_t gate) {
  if (bytes == 2) {
    static_cast<uint16_t*>(gates)[i] = static_cast<uint16_t>(gate);
  } else if (bytes == 4) {
    static_cast<uint32_t*>(gates)[i] = static_cast<uint32_t>(gate);
  } else if (bytes == 8) {
    static_cast<uint64_t*>(gates)[i] = gate;
  }
}

// The number of this warp among the warps of all blocks.
__device__ __forceinline__ int32_t Warp(const ExchangeCall& call) {
  return call.part * static_cast<int32_t>(blockDim.x / 32) + static_cast<int32_t>(threadIdx.x) / 32;
}

// What all warps take in turn. A warp asks for the next one before it needs it.
class Turns {
 public:
  __device__ __forceinline__ explicit Turns(uint32_t* next) : next_(next) { Ask(); }
  __device__ __forceinline__ int32_t Take() {
    const uint32_t turn = __shfl_sync(kFullWarp, ahead_, 0);
    Ask();
    return static_cast<int32_t>(turn);
  }

 private:
  __device__ __forceinline__ void Ask() {
    if (Lane() == 0) ahead_ = atomicAdd(next_, 1u);
  }

  uint32_t* next_;
  uint32_t ahead_ = 0;
};

// Rows are cut into n_pieces, the same on all ranks.
struct Pieces {
  int32_t row_bytes;
  int32_t n_pieces;
  int32_t piece_bytes;
};

// The part of a row that one warp moves.
struct Piece {
  int32_t number;
  int32_t begin;
  int32_t bytes;
};

__device__ __forceinline__ Piece PieceOf(const Pieces& pieces, int32_t item) {
  const int32_t number = item % pieces.n_pieces;
  const int32_t begin = number * pieces.piece_bytes;
  return {number, begin, min(pieces.piece_bytes, pieces.row_bytes - begin)};
}

// Consecutive items that a warp receives at once. A lane holds a choice of one of them.
struct Batch {
  int32_t begin;
  int32_t end;
  int32_t number;  // of this lane's item in the batch
  int32_t choice;  // of that item's token

  __device__ __forceinline__ Batch(int32_t turn, int32_t at_once, int32_t n_items, int32_t top_k)
      : begin(min(turn * at_once, n_items)),
        end(min(begin + at_once, n_items)),
        number(Lane() / top_k),
        choice(Lane() % top_k) {}
  __device__ __forceinline__ int32_t Item() const { return begin + number; }
  __device__ __forceinline__ bool HasLane() const { return Item() < end; }
  // The lanes that hold the choices of an item.
  __device__ __forceinline__ uint32_t LanesOf(int32_t item, int32_t top_k) const {
    return kFullWarp >> (32 - top_k) << (item - begin) * top_k;
  }
};

// As many items at once as leave each warp several turns and have a lane for each choice.
__device__ __forceinline__ int32_t ItemsAtOnce(int32_t n_items, int32_t top_k, int32_t most) {
  const int32_t n_warps = static_cast<int32_t>(gridDim.x * (blockDim.x / 32));
  return max(1, min(n_items / (4 * n_warps), min(most, 32 / top_k)));
}

__device__ __forceinline__ ExchangeCall& CallOfBlock() {
  __shared__ ExchangeCall call;
  return call;
}

// Reads lists, addresses and, if known, sizes into shared memory, and takes a part.
template <typename AnyExchange>
__device__ __forceinline__ ExchangeCall BeginExchange(const AnyExchange& exchange,
                                                      const Routing& routing, char** windows,
                                                      const int32_t* known_sizes = nullptr) {
  ExchangeCall& call = CallOfBlock();
  const int32_t n_ranks = exchange.shape.n_ranks;
  auto* lists = reinterpret_cast<int32_t*>(windows + n_ranks);
  int32_t* sizes = lists + kLists * n_ranks;
  for (int32_t i = threadIdx.x; i < n_ranks; i += blockDim.x) {
    windows[i] = exchange.windows[i];
    if (known_sizes != nullptr) sizes[i] = known_sizes[i];
  }
  for (int32_t i = threadIdx.x; i < kLists * n_ranks; i += blockDim.x) lists[i] = routing.lists[i];
  if (threadIdx.x == 0) {
    const bool wrong = *routing.rank != exchange.peers.rank;
    const volatile uint32_t* epoch = &exchange.state->epoch;
    const volatile int32_t* failed = &exchange.peers.state->failed;
    call.epoch = *epoch + 1;
    call.part = static_cast<int32_t>(atomicAdd(&exchange.state->started, 1u));
    call.failed = wrong || *failed != 0;
    call.windows = windows;
    call.lists = lists;
    call.sizes = sizes;
    call.patience = {};
    if (wrong) Report(exchange.peers, SyncFailure::kWrongRank, call.epoch, *routing.rank);
  }
  __syncthreads();
  return call;
}

// Tells every other rank that this one has begun, and how many tokens it sends, or that it has
// failed and sends none. All threads of one block call it. No fence is needed: earlier reads of the
// windows were made by kernels that have completed.
template <typename AnyExchange>
__device__ __forceinline__ void SendHeaders(const AnyExchange& exchange, const ExchangeCall& call,
                                            const int32_t* sizes) {
  for (int32_t peer = threadIdx.x; peer < exchange.shape.n_ranks; peer += blockDim.x) {
    if (peer == exchange.peers.rank) continue;
    SendHeader(exchange, peer, SlotOf(exchange, call, peer).headers + exchange.peers.rank,
               WordOf(call.epoch, call.failed, sizes[peer]));
  }
}

// Tells a thread whether to keep waiting for `source`, after its `looks` in vain, which it counts.
template <typename AnyExchange>
__device__ __forceinline__ bool KeepsWaiting(const AnyExchange& exchange, int32_t source,
                                             uint32_t& looks) {
  if (++looks % kLooks != 0) return true;
  const volatile int32_t* failed = &exchange.peers.state->failed;
  if (*failed != 0) return false;
  ExchangeCall& call = CallOfBlock();  // Read anew: the caller's registers are scarce.
  char* slot =
      exchange.windows[exchange.peers.rank] + (call.epoch & 1) * exchange.shape.SlotBytes();
  const uint64_t* headers = SlotAt(exchange, slot).headers;
  const bool in_vain = IsOfFailed(LoadWord(headers + source), call.epoch);
  if (!in_vain && call.patience.Lasts(exchange.peers.timeout_ns)) return true;
  const SyncFailure failure = in_vain ? SyncFailure::kPeerFailed : SyncFailure::kNoTokens;
  Report(exchange.peers, failure, call.epoch, source);
  return false;
}

// Waits, as a warp, for each lane's flag, unless it is null, from its `source`. Returns false if
// one is not raised in time.
template <typename AnyExchange>
__device__ __forceinline__ bool AwaitFlags(const AnyExchange& exchange, const ExchangeCall& call,
                                           typename Slot<AnyExchange>::Flag* flag, int32_t source) {
  uint32_t looks = 0;
  for (;;) {
    const bool missing = flag != nullptr && !HasCome(exchange, flag, call.epoch);
    const uint32_t lanes = __ballot_sync(kFullWarp, missing);
    if (lanes == 0) break;
    const int32_t first = __shfl_sync(kFullWarp, source, __ffs(lanes) - 1);
    const bool lasts = Lane() != 0 || KeepsWaiting(exchange, first, looks);
    if (!__all_sync(kFullWarp, lasts)) return false;
  }
  __syncwarp();  // Every lane reads what the others' flags announce.
  return true;
}

// Waits, as a block, until all other ranks have begun, and calls `use(source, size)` for each.
template <typename AnyExchange, typename Use>
__device__ __forceinline__ bool AwaitHeaders(const AnyExchange& exchange, const ExchangeCall& call,
                                             const Use& use) {
  const uint64_t* headers = SlotOf(exchange, call, exchange.peers.rank).headers;
  bool lasts = true;
  for (int32_t source = threadIdx.x; source < exchange.shape.n_ranks && lasts;
       source += blockDim.x) {
    if (source == exchange.peers.rank) {
      use(source, 0);
      continue;
    }
    uint32_t looks = 0;
    uint64_t header = LoadAcquired(headers + source);
    while (static_cast<uint32_t>(header >> 32) != call.epoch && lasts) {
      lasts = KeepsWaiting(exchange, source, looks);
      header = LoadAcquired(headers + source);
    }
    if (lasts) use(source, static_cast<int32_t>(header));
  }
  return __syncthreads_and(lasts);
}

// The tokens that arrive from other ranks, one from each source in turn.
struct Received {
  int32_t source;
  int32_t order;  // in the source's list
  bool exists;
};
template <typename AnyExchange>
__device__ __forceinline__ Received ReceivedToken(const AnyExchange& exchange,
                                                  const ExchangeCall& call, int32_t token) {
  const int32_t n_others = exchange.shape.n_ranks - 1;
  const int32_t order = token / n_others;
  const int32_t source = (exchange.peers.rank + 1 + token % n_others) % exchange.shape.n_ranks;
  return {source, order, order < call.sizes[source]};
}

__device__ __forceinline__ void FillOnes(void* memory, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
    static_cast<uint16_t*>(memory)[i] = 0xffff;
  }
}

template <typename Byte>
__device__ __forceinline__ Byte* RowAt(const RowArrays<Byte>& of, int32_t row, int32_t row_bytes) {
  if (of.per_entry == 1 && of.listed == nullptr) return of.data[0] + int64_t{row} * row_bytes;
  int32_t entry = row / of.per_entry;
  int32_t number = row - entry * of.per_entry;
  if (of.listed != nullptr) {
    const auto last = static_cast<uint32_t>(of.n_entries - 1);
    entry = static_cast<int32_t>(min(static_cast<uint32_t>(__ldg(of.listed + entry)), last));
  }
  Byte* data = of.data[0];
  int32_t rows = of.rows[0];
#pragma unroll
  for (int k = 1; k < kMostArrays; ++k) {
    if (number < rows) continue;
    number -= rows;
    data = of.data[k];
    rows = of.rows[k];
  }
  return data + (int64_t{entry} * rows + number) * row_bytes;
}

// FillOnes of the entries from that of `first_row` on.
__device__ __forceinline__ void FillRows(const RowArrays<char>& of, int32_t first_row,
                                         int32_t row_bytes) {
  const int32_t first = first_row / of.per_entry;
  for (int k = 0; k < of.n_arrays; ++k) {
    const int64_t bytes = int64_t{of.rows[k]} * row_bytes;  // of an entry
    FillOnes(of.data[k] + first * bytes, (of.n_entries - first) * bytes);
  }
}

// Ends an exchange. Returns true in all threads of the last block if it failed: that block must
// then overwrite the partial result.
template <typename AnyExchange>
__device__ __forceinline__ bool FinishExchange(const AnyExchange& exchange,
                                               const ExchangeCall& call) {
  __shared__ bool last_of_failed;
  __syncthreads();
  if (threadIdx.x == 0) {
    ExchangeState* state = exchange.state;
    __threadfence();
    const bool last = atomicAdd(&state->finished, 1u) == gridDim.x - 1;
    if (last) {
      __threadfence();
      state->started = state->finished = state->next_received = 0;
      state->epoch = call.epoch;
    }
    const volatile int32_t* failed = &exchange.peers.state->failed;
    last_of_failed = last && *failed != 0;
  }
  __syncthreads();
  return last_of_failed;
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_EXCHANGE_CUH_
