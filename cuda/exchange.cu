// Tokens to rows on all ranks, and rows back to tokens. Each is the transpose of the other.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/exchange.cuh"
#include "cuda/launch.cuh"

namespace lplb::cuda {
namespace {

// Each block has an SM to itself. Sums need more registers than copies.
constexpr int32_t kThreadsThere = 1024;
constexpr int32_t kThreadsBack = 768;
constexpr int32_t kItemsPerBlock = 8;  // Below this, starting more blocks costs more than it saves.
constexpr int kFlight = 4;             // Words that a lane has in flight.
constexpr int kFlightSums = 2;         // The same for sums, which need more registers.
constexpr int32_t kStepBytes = kFlightSums * 32 * kWord;

// A token's choices, one per lane.
struct Choice {
  int32_t rank;   // −1 if the choice has no row
  int32_t row;    // on that rank
  int32_t order;  // see Routing
};

// A choice as stored in memory, loaded for the next token while the current one is moved.
struct PackedChoice {
  int32_t row = -1;
  int32_t order = -1;

  __device__ __forceinline__ Choice Unpacked(const Routing& routing) const {
    const int32_t rank = row < 0 ? -1 : row / routing.capacity;
    return {rank, row - max(rank, 0) * routing.capacity, order};
  }
};

__device__ __forceinline__ PackedChoice LoadChoice(const Routing& routing, int32_t token) {
  PackedChoice choice;
  if (token < routing.n_tokens && Lane() < routing.top_k) {
    const int64_t i = static_cast<int64_t>(token) * routing.top_k + Lane();
    choice.row = __ldg(routing.row + i);
    choice.order = __ldg(routing.order + i);
  }
  return choice;
}

// Copies a piece of a row to the `target` of every lane where it is not null, and raises the flags
// of pieces copied before.
__device__ __forceinline__ void CopyPiece(const ExchangeCall& call, const char* row,
                                          const Piece& piece, char* target, PendingFlags* pending) {
  const int32_t end = piece.begin + piece.bytes;
  for (int32_t step = piece.begin; step < end; step += kFlight * 32 * kWord) {
    const int32_t begin = step + Lane() * kWord;
    uint4 words[kFlight];
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      if (begin + j * 32 * kWord < end) words[j] = LoadWide(row + begin + j * 32 * kWord);
    }
    if (pending != nullptr) pending->RaiseIfMany(call);
    for (uint32_t rest = __ballot_sync(kFullWarp, target != nullptr); rest != 0; rest &= rest - 1) {
      const auto address = reinterpret_cast<uint64_t>(target);
      char* to = reinterpret_cast<char*>(__shfl_sync(kFullWarp, address, __ffs(rest) - 1));
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        if (begin + j * 32 * kWord < end) StoreWide(to + begin + j * 32 * kWord, words[j]);
      }
    }
  }
}

// Sends a piece of a token once to each other rank that has rows for it, with the row numbers and
// gates.
__device__ __forceinline__ void SendToken(const Exchange& exchange, const ExchangeCall& call,
                                          const ThereArguments& in, const Pieces& pieces,
                                          int32_t item, const Choice& choice,
                                          PendingFlags* pending) {
  const WindowShape& shape = exchange.shape;
  const Piece piece = PieceOf(pieces, item);
  const int32_t token = item / pieces.n_pieces;
  const bool sends = choice.order >= 0;
  const uint32_t senders = __ballot_sync(kFullWarp, sends);
  if (senders == 0) return;
  Slot slot = {};
  char* target = nullptr;
  int64_t entry = 0;
  if (sends) {
    slot = SlotOf(exchange, call, choice.rank);
    const int64_t place = call.ListAt(exchange, kStartsThere, choice.rank) + choice.order;
    target = slot.rows + place * shape.row_bytes;
    entry = place * pieces.n_pieces + piece.number;
  }
  uint64_t gate = 0;
  if (Lane() < in.routing.top_k) {
    const int64_t i = static_cast<int64_t>(token) * in.routing.top_k + Lane();
    gate = LoadGate(in.gates, i, in.gate_bytes);
  }
  const char* tokens = static_cast<const char*>(in.tokens);
  CopyPiece(call, tokens + static_cast<int64_t>(token) * in.row_bytes, piece, target, pending);
  for (uint32_t rest = senders; rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    const int32_t rank = __shfl_sync(kFullWarp, choice.rank, from);
    const auto numbers = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(slot.numbers), from);
    const auto gates = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(slot.gates), from);
    const int64_t i = __shfl_sync(kFullWarp, entry, from) * shape.top_k + Lane();
    if (Lane() < in.routing.top_k) {
      reinterpret_cast<int32_t*>(numbers)[i] = choice.rank == rank ? choice.row : -1;
      reinterpret_cast<uint64_t*>(gates)[i] = gate;
    }
  }
  pending->Add(sends ? slot.flags + entry : nullptr);
}

__device__ __forceinline__ void SendTokens(const Exchange& exchange, const ExchangeCall& call,
                                           const ThereArguments& in, const Pieces& pieces,
                                           int32_t n_senders) {
  const int32_t n_items = in.routing.n_tokens * pieces.n_pieces;
  const int32_t n_warps = n_senders * static_cast<int32_t>(blockDim.x / 32);
  int32_t item = Warp(call);
  PackedChoice next = LoadChoice(in.routing, item / pieces.n_pieces);
  PendingFlags pending;
  for (; item < n_items; item += n_warps) {
    const Choice choice = next.Unpacked(in.routing);
    next = LoadChoice(in.routing, (item + n_warps) / pieces.n_pieces);
    SendToken(exchange, call, in, pieces, item, choice, &pending);
  }
  pending.Raise(call);
}

// Writes a piece of a token to its rows on this rank. Each lane holds a row number, or −1, and the
// row's gate.
__device__ __forceinline__ void Expand(const ExchangeCall& call, const ThereArguments& in,
                                       const Piece& piece, const char* token, int32_t row,
                                       uint64_t gate) {
  char* target = nullptr;
  if (row >= 0) {
    target = static_cast<char*>(in.rows) + static_cast<int64_t>(row) * in.row_bytes;
    if (piece.number == 0) StoreGate(in.row_gates, row, in.gate_bytes, gate);
  }
  CopyPiece(call, token, piece, target, nullptr);
}

__device__ __forceinline__ void ExpandOwn(const Exchange& exchange, const ExchangeCall& call,
                                          const ThereArguments& in, const Piece& piece,
                                          int32_t token) {
  const Choice choice = LoadChoice(in.routing, token).Unpacked(in.routing);
  const int32_t row = choice.rank == exchange.peers.rank ? choice.row : -1;
  if (__all_sync(kFullWarp, row < 0)) return;
  uint64_t gate = 0;
  if (row >= 0) {
    const int64_t i = static_cast<int64_t>(token) * in.routing.top_k + Lane();
    gate = LoadGate(in.gates, i, in.gate_bytes);
  }
  const char* from = static_cast<const char*>(in.tokens);
  Expand(call, in, piece, from + static_cast<int64_t>(token) * in.row_bytes, row, gate);
}

__device__ __forceinline__ bool ExpandReceived(const Exchange& exchange, const ExchangeCall& call,
                                               const ThereArguments& in, const Pieces& pieces,
                                               const Piece& piece, const Slot& slot, int32_t source,
                                               int64_t place) {
  const int64_t entry = place * pieces.n_pieces + piece.number;
  if (!AwaitFlag(exchange, call, slot.flags + entry, source)) return false;
  const WindowShape& shape = exchange.shape;
  int32_t row = -1;
  uint64_t gate = 0;
  if (Lane() < in.routing.top_k) {
    row = __ldcg(slot.numbers + entry * shape.top_k + Lane());
    gate = __ldcg(reinterpret_cast<const unsigned long long*>(slot.gates) + entry * shape.top_k +
                  Lane());
    if (piece.number == 0) in.numbers[place * in.routing.top_k + Lane()] = row;
  }
  Expand(call, in, piece, slot.rows + place * shape.row_bytes, row, gate);
  return true;
}

// This rank's own tokens come first: they need no waiting.
__device__ __forceinline__ void ReceiveTokens(const Exchange& exchange, const ExchangeCall& call,
                                              const ThereArguments& in, const Pieces& pieces) {
  __shared__ int32_t longest;
  if (threadIdx.x == 0) longest = 0;
  const int32_t n_ranks = exchange.shape.n_ranks;
  const int32_t n_own = in.routing.n_tokens * pieces.n_pieces;
  Items items(&exchange.state->next_received);
  int32_t item = items.Take();
  for (; item < n_own; item = items.Take()) {
    ExpandOwn(exchange, call, in, PieceOf(pieces, item), item / pieces.n_pieces);
  }
  __syncthreads();
  const bool begun = AwaitHeaders(exchange, call, [&](int32_t source, int32_t size) {
    call.sizes[source] = size;
    atomicMax(&longest, size);
    if (call.part == 0) in.sizes[source] = size;
  });
  if (!begun) return;
  const int64_t n_items = int64_t{longest} * (n_ranks - 1) * pieces.n_pieces;
  const Slot slot = SlotOf(exchange, call, exchange.peers.rank);
  for (item -= n_own; item < n_items; item = items.Take() - n_own) {
    const Received received = ReceivedToken(exchange, call, item / pieces.n_pieces);
    if (!received.exists) continue;
    const int64_t place = call.ListAt(exchange, kStartsHere, received.source) + received.order;
    if (!ExpandReceived(exchange, call, in, pieces, PieceOf(pieces, item), slot, received.source,
                        place)) {
      return;
    }
  }
}

__global__ void __launch_bounds__(kThreadsThere, 1)
    ThereKernel(const Exchange exchange, const ThereArguments in, const Pieces pieces,
                int32_t n_senders) {
  extern __shared__ char* memory[];
  const ExchangeCall call = BeginExchange(exchange, in.routing, memory);
  if (!call.failed) {
    if (call.part == 0) {
      SendHeaders(exchange, call, call.lists + kSizesSent * exchange.shape.n_ranks);
    }
    if (call.part < n_senders) SendTokens(exchange, call, in, pieces, n_senders);
    ReceiveTokens(exchange, call, in, pieces);
  }
  if (FinishExchange(exchange, call)) {
    FillOnes(in.rows, static_cast<int64_t>(in.routing.capacity) * in.row_bytes);
    FillOnes(in.row_gates, static_cast<int64_t>(in.routing.capacity) * in.gate_bytes);
  }
}

// The elements of a word, and the type in which they are summed.
template <typename T>
struct Wide {
  using Type = float;
};
template <>
struct Wide<double> {
  using Type = double;
};

template <typename T>
struct Sum {
  static constexpr int kElements = kWord / sizeof(T);
  typename Wide<T>::Type of[kElements] = {};

  __device__ __forceinline__ void Add(const uint4& word) {
    const T* elements = reinterpret_cast<const T*>(&word);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      of[i] += static_cast<typename Wide<T>::Type>(elements[i]);
    }
  }
  __device__ __forceinline__ uint4 Rounded() const {
    uint4 word;
    T* elements = reinterpret_cast<T*>(&word);
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = static_cast<T>(of[i]);
    return word;
  }
};

// Sums this rank's rows from byte `begin` on, before `end`. Each lane holds a row number, and
// `rows` is the mask of lanes to add. Two rows are in flight at once.
template <typename T>
__device__ __forceinline__ void SumRows(const BackArguments& in, int32_t row, uint32_t rows,
                                        int32_t begin, int32_t end, uint4* out) {
  Sum<T> sums[kFlightSums];
  while (rows != 0) {
    uint4 words[2][kFlightSums];
    bool there[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      there[r] = rows != 0;
      const int32_t number = __shfl_sync(kFullWarp, row, there[r] ? __ffs(rows) - 1 : 0);
      rows &= rows - 1;
      const char* from =
          static_cast<const char*>(in.rows) + static_cast<int64_t>(number) * in.row_bytes + begin;
#pragma unroll
      for (int j = 0; j < kFlightSums; ++j) {
        const bool inside = there[r] && begin + j * 32 * kWord < end;
        words[r][j] = inside ? LoadWide(from + j * 32 * kWord) : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int j = 0; j < kFlightSums; ++j) {
        if (there[r]) sums[j].Add(words[r][j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kFlightSums; ++j) out[j] = sums[j].Rounded();
}

__device__ __forceinline__ void StoreWords(char* to, int32_t begin, int32_t end,
                                           const uint4* words) {
#pragma unroll
  for (int j = 0; j < kFlightSums; ++j) {
    if (begin + j * 32 * kWord < end) StoreWide(to + begin + j * 32 * kWord, words[j]);
  }
}

// Sums over ranks from byte `begin` on, before `end`. Each lane holds the place in the window of
// what its rank sent. `firsts` is the mask of lanes to add, `own_rows` the mask of this rank's
// rows.
template <typename T>
__device__ __forceinline__ void SumRanks(const BackArguments& in, const char* window,
                                         int32_t window_row_bytes, int32_t row, uint32_t own_rows,
                                         int32_t place, uint32_t firsts, int32_t begin, int32_t end,
                                         uint4* words) {
  Sum<T> sums[kFlightSums];
  for (uint32_t rest = firsts; rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    const int64_t at = __shfl_sync(kFullWarp, place, from);
    if ((own_rows >> from & 1) != 0) {
      SumRows<T>(in, row, own_rows, begin, end, words);
    } else {
      const char* sent = window + at * window_row_bytes + begin;
#pragma unroll
      for (int j = 0; j < kFlightSums; ++j) {
        const bool inside = begin + j * 32 * kWord < end;
        words[j] = inside ? LoadWide(sent + j * 32 * kWord) : uint4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int j = 0; j < kFlightSums; ++j) sums[j].Add(words[j]);
  }
#pragma unroll
  for (int j = 0; j < kFlightSums; ++j) words[j] = sums[j].Rounded();
}

// The row numbers of a received token, one per lane; −1 for none.
__device__ __forceinline__ int32_t LoadNumber(const Routing& routing, const int32_t* numbers,
                                              const Received& received, int64_t place) {
  if (!received.exists || Lane() >= routing.top_k) return -1;
  return __ldg(numbers + place * routing.top_k + Lane());
}

// Sends a piece of the sum over a received token's rows back to the rank that sent the token.
template <typename T>
__device__ __forceinline__ void SendSum(const Exchange& exchange, const ExchangeCall& call,
                                        const BackArguments& in, const Pieces& pieces,
                                        const Piece& piece, int32_t rank, int64_t place,
                                        int32_t row, PendingFlags* pending) {
  const WindowShape& shape = exchange.shape;
  const int64_t entry = place * pieces.n_pieces + piece.number;
  const Slot slot = SlotOf(exchange, call, rank);
  char* to = slot.rows + place * shape.row_bytes;
  const uint32_t rows = __ballot_sync(kFullWarp, row >= 0);
  uint64_t gate = 0;
  if (row >= 0 && piece.number == 0) gate = LoadGate(in.row_gates, row, in.gate_bytes);
  if (__popc(rows) == 1) {
    const int64_t only = __shfl_sync(kFullWarp, row, __ffs(rows) - 1);
    const char* from = static_cast<const char*>(in.rows) + only * in.row_bytes;
    CopyPiece(call, from, piece, Lane() == 0 ? to : nullptr, pending);
  } else {
    const int32_t end = piece.begin + piece.bytes;
    for (int32_t step = piece.begin; step < end; step += kStepBytes) {
      const int32_t begin = step + Lane() * kWord;
      uint4 words[kFlightSums];
      SumRows<T>(in, row, rows, begin, end, words);
      pending->RaiseIfMany(call);
      StoreWords(to, begin, end, words);
    }
  }
  if (row >= 0 && piece.number == 0) slot.gates[entry * shape.top_k + Lane()] = gate;
  pending->Add(Lane() == 0 ? slot.flags + entry : nullptr);
}

template <typename T>
__device__ __forceinline__ void SendSums(const Exchange& exchange, const ExchangeCall& call,
                                         const BackArguments& in, const Pieces& pieces,
                                         int32_t n_senders) {
  const int32_t n_ranks = exchange.shape.n_ranks;
  int32_t longest = 0;
  for (int32_t rank = 0; rank < n_ranks; ++rank) longest = max(longest, call.sizes[rank]);
  const int32_t n_items = longest * (n_ranks - 1) * pieces.n_pieces;
  const int32_t n_warps = n_senders * static_cast<int32_t>(blockDim.x / 32);
  const auto place_of = [&](const Received& received, List list) {
    return int64_t{call.ListAt(exchange, list, received.source)} + received.order;
  };
  const auto received_of = [&](int32_t item) {
    if (item >= n_items) return Received{0, 0, false};
    return ReceivedToken(exchange, call, item / pieces.n_pieces);
  };
  const auto row_of = [&](const Received& received) {
    return LoadNumber(in.routing, in.numbers, received, place_of(received, kStartsHere));
  };
  int32_t item = Warp(call);
  Received received = received_of(item);
  int32_t row = row_of(received);
  PendingFlags pending;
  for (; item < n_items; item += n_warps) {
    const Received next = received_of(item + n_warps);
    const int32_t next_row = row_of(next);
    if (received.exists) {
      SendSum<T>(exchange, call, in, pieces, PieceOf(pieces, item), received.source,
                 place_of(received, kStartsHome), row, &pending);
    }
    received = next;
    row = next_row;
  }
  pending.Raise(call);
}

// Sums the ranks' results for a piece of one of this rank's tokens.
template <typename T>
__device__ __forceinline__ bool ReceiveSums(const Exchange& exchange, const ExchangeCall& call,
                                            const BackArguments& in, const Pieces& pieces,
                                            const Slot& slot, int32_t item) {
  const Routing& routing = in.routing;
  const WindowShape& shape = exchange.shape;
  const Piece piece = PieceOf(pieces, item);
  const int32_t token = item / pieces.n_pieces;
  const Choice choice = LoadChoice(routing, token).Unpacked(routing);
  const bool own = choice.rank == exchange.peers.rank;
  const bool remote = choice.rank >= 0 && !own;
  // All of a rank's choices share the place of the first.
  const int first = __ffs(__match_any_sync(kFullWarp, choice.rank)) - 1;
  const int32_t order = __shfl_sync(kFullWarp, choice.order, first);
  int32_t place = 0;
  if (remote) place = call.ListAt(exchange, kStartsReturn, choice.rank) + order;
  const uint32_t own_rows = __ballot_sync(kFullWarp, own);
  const uint32_t firsts = __ballot_sync(kFullWarp, choice.rank >= 0 && Lane() == first);
  for (uint32_t rest = firsts & ~own_rows; rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    const int64_t at = __shfl_sync(kFullWarp, place, from);
    const uint32_t* flag = slot.flags + at * pieces.n_pieces + piece.number;
    const int32_t rank = __shfl_sync(kFullWarp, choice.rank, from);
    if (!AwaitFlag(exchange, call, flag, rank)) return false;
  }
  char* to = static_cast<char*>(in.tokens) + static_cast<int64_t>(token) * in.row_bytes;
  const int32_t end = piece.begin + piece.bytes;
  if (own_rows == 0 && __popc(firsts) == 1) {
    const int64_t at = __shfl_sync(kFullWarp, place, __ffs(firsts) - 1);
    CopyPiece(call, slot.rows + at * shape.row_bytes, piece, Lane() == 0 ? to : nullptr, nullptr);
  } else {
    for (int32_t step = piece.begin; step < end; step += kStepBytes) {
      const int32_t begin = step + Lane() * kWord;
      uint4 words[kFlightSums];
      SumRanks<T>(in, slot.rows, shape.row_bytes, choice.row, own_rows, place, firsts, begin, end,
                  words);
      StoreWords(to, begin, end, words);
    }
  }
  if (piece.number == 0 && Lane() < routing.top_k) {
    uint64_t gate = 0;
    if (own) gate = LoadGate(in.row_gates, choice.row, in.gate_bytes);
    if (remote) {
      const int64_t i = int64_t{place} * pieces.n_pieces * shape.top_k + Lane();
      gate = __ldcg(reinterpret_cast<const unsigned long long*>(slot.gates) + i);
    }
    StoreGate(in.gates, static_cast<int64_t>(token) * routing.top_k + Lane(), in.gate_bytes, gate);
  }
  return true;
}

template <typename T>
__global__ void __launch_bounds__(kThreadsBack, 1)
    BackKernel(const Exchange exchange, const BackArguments in, const Pieces pieces,
               int32_t n_senders) {
  extern __shared__ char* memory[];
  const ExchangeCall call = BeginExchange(exchange, in.routing, memory, in.sizes);
  if (!call.failed) {
    if (call.part == 0) SendHeaders(exchange, call, call.sizes);
    if (call.part < n_senders) SendSums<T>(exchange, call, in, pieces, n_senders);
    const Slot slot = SlotOf(exchange, call, exchange.peers.rank);
    const int32_t n_items = in.routing.n_tokens * pieces.n_pieces;
    Items items(&exchange.state->next_received);
    for (int32_t i = items.Take(); i < n_items; i = items.Take()) {
      if (!ReceiveSums<T>(exchange, call, in, pieces, slot, i)) break;
    }
    // Also waits for ranks that send nothing, see WindowShape.
    if (call.part == 0) AwaitHeaders(exchange, call, [](int32_t, int32_t) {});
  }
  if (FinishExchange(exchange, call)) {
    const int64_t n_tokens = in.routing.n_tokens;
    FillOnes(in.tokens, n_tokens * in.row_bytes);
    FillOnes(in.gates, n_tokens * in.routing.top_k * in.gate_bytes);
  }
}

using BackPointer = void (*)(const Exchange, const BackArguments, const Pieces, int32_t);

BackPointer BackKernelOf(RowType type) {
  switch (type) {
    case RowType::kBFloat16:
      return BackKernel<__nv_bfloat16>;
    case RowType::kFloat16:
      return BackKernel<__half>;
    case RowType::kFloat32:
      return BackKernel<float>;
    case RowType::kFloat64:
      return BackKernel<double>;
  }
  return nullptr;
}

// Depends on sizes only, so that all ranks cut alike, and never makes more pieces than there are
// entries. A piece is a multiple of what a warp sums at once.
Pieces PiecesOf(const Routing& routing, int32_t n_ranks, int32_t row_bytes) {
  const int32_t most_tokens =
      std::max(routing.n_received, routing.n_tokens * std::min(routing.top_k, n_ranks));
  const int32_t steps = (row_bytes + kStepBytes - 1) / kStepBytes;
  const int32_t n_pieces = std::clamp(kMinItems / std::max(most_tokens, 1), 1, steps);
  const int32_t piece_bytes = (steps + n_pieces - 1) / n_pieces * kStepBytes;
  return {row_bytes, (row_bytes + piece_bytes - 1) / piece_bytes, piece_bytes};
}

LaunchShape ShapeOf(const Exchange& exchange, const ExchangeOptions& options, int32_t threads) {
  LaunchShape shape = {dim3(options.n_blocks), threads};
  shape.shared_bytes = ExchangeCall::SharedBytes(exchange.shape.n_ranks);
  return shape;
}

}  // namespace

ExchangeOptions ChooseOptions(const Routing& routing, int32_t n_ranks, int32_t row_bytes,
                              int32_t n_sms) {
  const int64_t n_items =
      int64_t{PiecesOf(routing, n_ranks, row_bytes).n_pieces} * routing.n_tokens;
  const auto n_blocks = static_cast<int32_t>(
      std::clamp<int64_t>((n_items + kItemsPerBlock - 1) / kItemsPerBlock, 1, n_sms));
  return {n_blocks, (n_blocks + 1) / 2};
}

cudaError_t LaunchThere(const Exchange& exchange, const ThereArguments& arguments,
                        const ExchangeOptions& options, cudaStream_t stream) {
  return Launch(ThereKernel, ShapeOf(exchange, options, kThreadsThere), stream, exchange, arguments,
                PiecesOf(arguments.routing, exchange.shape.n_ranks, arguments.row_bytes),
                options.n_senders);
}

cudaError_t LaunchBack(const Exchange& exchange, const BackArguments& arguments,
                       const ExchangeOptions& options, cudaStream_t stream) {
  return Launch(BackKernelOf(arguments.type), ShapeOf(exchange, options, kThreadsBack), stream,
                exchange, arguments,
                PiecesOf(arguments.routing, exchange.shape.n_ranks, arguments.row_bytes),
                options.n_senders);
}

cudaError_t PreloadExchange() {
  cudaFuncAttributes attributes;
  cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(ThereKernel));
  for (const RowType type :
       {RowType::kBFloat16, RowType::kFloat16, RowType::kFloat32, RowType::kFloat64}) {
    if (error != cudaSuccess) return error;
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(BackKernelOf(type)));
  }
  return error;
}

}  // namespace lplb::cuda
