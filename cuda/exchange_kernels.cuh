// The kernels of both directions, for each way of sending to other ranks.
#ifndef LPLB_CUDA_EXCHANGE_KERNELS_CUH_
#define LPLB_CUDA_EXCHANGE_KERNELS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/exchange.cuh"

namespace lplb::cuda {

// How the warps of a block share its SM.
template <int32_t threads, int flight, int32_t flight_sums, int32_t most_at_once, int32_t fences>
struct Way {
  static constexpr int32_t kThreads = threads;          // at most
  static constexpr int kFlight = flight;                // words of a copy that a lane has in flight
  static constexpr int32_t kFlightSums = flight_sums;   // bytes of a sum that a warp has in flight
  static constexpr int32_t kMostAtOnce = most_at_once;  // items that a warp receives at once
  static constexpr int32_t kFences = fences;            // of a warp that sends few items
};

using Putting = Way<kPutThreads, 8, 8192, 4, 1>;  // where ranks send by put

constexpr int32_t kPieceUnit = 1024;  // bytes; pieces are multiples of it

// The rows of one warp that go to other ranks. A specialization has
//   a constructor, from the number of rows that should leave together, if they are not too many;
//   kThere, kBack: the lists that tell at which place a token, or a sum, is to be written;
//   SlotTo: the slot with that place;
//   Add: each lane that `sends` has written the row at `entry` of `slot`, which goes to place
//     `arrives` of the window of `rank`;
//   Leave: sends what was added; LeaveIfMany: likewise, or waits for more.
template <typename AnyExchange>
class Outbox;

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

__device__ __forceinline__ PackedChoice LoadChoice(const Routing& routing, int32_t token,
                                                   int32_t number) {
  PackedChoice choice;
  if (token < routing.n_tokens && number < routing.top_k) {
    const int64_t i = static_cast<int64_t>(token) * routing.top_k + number;
    choice.row = __ldg(routing.row + i);
    choice.order = __ldg(routing.order + i);
  }
  return choice;
}

// Copies a piece of a row to the `target` of every lane where it is not null. `meanwhile` is called
// while the words load.
template <typename W, typename Meanwhile>
__device__ __forceinline__ void CopyPiece(const char* row, const Piece& piece, char* target,
                                          const Meanwhile& meanwhile) {
  const int32_t end = piece.begin + piece.bytes;
  for (int32_t step = piece.begin; step < end; step += W::kFlight * 32 * kWord) {
    const int32_t begin = step + Lane() * kWord;
    uint4 words[W::kFlight];
#pragma unroll
    for (int j = 0; j < W::kFlight; ++j) {
      words[j] = LoadWide(row + begin + j * 32 * kWord, begin + j * 32 * kWord < end);
    }
    meanwhile();
    for (uint32_t rest = __ballot_sync(kFullWarp, target != nullptr); rest != 0; rest &= rest - 1) {
      const auto address = reinterpret_cast<uint64_t>(target);
      char* to = reinterpret_cast<char*>(__shfl_sync(kFullWarp, address, __ffs(rest) - 1));
#pragma unroll
      for (int j = 0; j < W::kFlight; ++j) {
        StoreWide(to + begin + j * 32 * kWord, words[j], begin + j * 32 * kWord < end);
      }
    }
  }
}

// Sends a piece of a token once to each other rank that has rows for it, with the row numbers and
// gates.
template <typename W, typename AnyExchange>
__device__ __forceinline__ void SendToken(const AnyExchange& exchange, const ExchangeCall& call,
                                          const ThereArguments& in, const Pieces& pieces,
                                          int32_t item, const Choice& choice,
                                          Outbox<AnyExchange>* outbox) {
  const auto& shape = exchange.shape;
  const Piece piece = PieceOf(pieces, item);
  const int32_t token = item / pieces.n_pieces;
  const bool sends = choice.order >= 0;
  const uint32_t senders = __ballot_sync(kFullWarp, sends);
  if (senders == 0) return;
  Slot<AnyExchange> slot = {};
  char* target = nullptr;
  int64_t entry = 0, arrives = 0;
  if (sends) {
    slot = outbox->SlotTo(exchange, call, choice.rank);
    const int64_t place = call.ListAt(exchange, outbox->kThere, choice.rank) + choice.order;
    arrives = call.ListAt(exchange, kStartsThere, choice.rank) + choice.order;
    target = slot.rows + place * shape.RowStride();
    entry = place * pieces.n_pieces + piece.number;
  }
  uint64_t gate = 0;
  if (Lane() < in.routing.top_k) {
    const int64_t i = static_cast<int64_t>(token) * in.routing.top_k + Lane();
    gate = LoadGate(in.gates, i, in.gate_bytes);
  }
  CopyPiece<W>(RowAt(in.tokens, token, in.row_bytes), piece, target,
               [&] { outbox->LeaveIfMany(call); });
  for (uint32_t rest = senders; rest != 0; rest &= rest - 1) {
    const int from = __ffs(rest) - 1;
    const int32_t rank = __shfl_sync(kFullWarp, choice.rank, from);
    const auto numbers = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(slot.numbers), from);
    const auto gates = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(slot.gates), from);
    const int64_t at = __shfl_sync(kFullWarp, entry, from);
    const int64_t number_at = at * shape.NumberStride() + Lane();
    const int64_t gate_at = at * shape.GateStride() + Lane();
    if (Lane() < in.routing.top_k) {
      reinterpret_cast<int32_t*>(numbers)[number_at] = choice.rank == rank ? choice.row : -1;
      reinterpret_cast<uint64_t*>(gates)[gate_at] = gate;
    }
  }
  outbox->Add(exchange, call, pieces, sends, slot, entry, choice.rank, arrives);
}

template <typename W, typename AnyExchange>
__device__ __forceinline__ void SendTokens(const AnyExchange& exchange, const ExchangeCall& call,
                                           const ThereArguments& in, const Pieces& pieces,
                                           int32_t n_senders) {
  const int32_t n_items = in.routing.n_tokens * pieces.n_pieces;
  const int32_t n_warps = n_senders * static_cast<int32_t>(blockDim.x / 32);
  int32_t item = Warp(call);
  PackedChoice next = LoadChoice(in.routing, item / pieces.n_pieces, Lane());
  Outbox<AnyExchange> outbox(pieces, n_items / n_warps / W::kFences);
  for (; item < n_items; item += n_warps) {
    const Choice choice = next.Unpacked(in.routing);
    next = LoadChoice(in.routing, (item + n_warps) / pieces.n_pieces, Lane());
    SendToken<W>(exchange, call, in, pieces, item, choice, &outbox);
  }
  outbox.Leave(call);
}

// Writes received pieces to their rows on this rank. Each lane holds where its item's token lies,
// the row of its choice, or −1, and that row's gate.
template <typename W>
__device__ __forceinline__ void Expand(const ThereArguments& in, const Pieces& pieces,
                                       const Batch& batch, const char* token, int32_t row,
                                       uint64_t gate) {
  char* target = nullptr;
  if (row >= 0) {
    target = RowAt(in.rows, row, in.row_bytes);
    if (PieceOf(pieces, batch.Item()).number == 0) {
      StoreGate(in.row_gates, row, in.gate_bytes, gate);
    }
  }
  const int32_t top_k = in.routing.top_k;
  for (int32_t item = batch.begin; item < batch.end; ++item) {
    const bool mine = batch.Item() == item;
    if (!__any_sync(kFullWarp, mine && row >= 0)) continue;
    const auto from =
        __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(token), (item - batch.begin) * top_k);
    CopyPiece<W>(reinterpret_cast<const char*>(from), PieceOf(pieces, item),
                 mine ? target : nullptr, [] {});
  }
}

template <typename W, typename AnyExchange>
__device__ __forceinline__ void ExpandOwn(const AnyExchange& exchange, const ThereArguments& in,
                                          const Pieces& pieces, const Batch& batch) {
  const int32_t token = batch.HasLane() ? batch.Item() / pieces.n_pieces : in.routing.n_tokens;
  const Choice choice = LoadChoice(in.routing, token, batch.choice).Unpacked(in.routing);
  const int32_t row = choice.rank == exchange.peers.rank ? choice.row : -1;
  if (__all_sync(kFullWarp, row < 0)) return;
  uint64_t gate = 0;
  if (row >= 0) {
    const int64_t i = static_cast<int64_t>(token) * in.routing.top_k + batch.choice;
    gate = LoadGate(in.gates, i, in.gate_bytes);
  }
  // Lanes without an item have no token, and a list of entries ends before theirs.
  const char* from = batch.HasLane() ? RowAt(in.tokens, token, in.row_bytes) : nullptr;
  Expand<W>(in, pieces, batch, from, row, gate);
}

template <typename W, typename AnyExchange>
__device__ __forceinline__ bool ExpandReceived(const AnyExchange& exchange,
                                               const ExchangeCall& call, const ThereArguments& in,
                                               const Pieces& pieces, const Slot<AnyExchange>& slot,
                                               const Batch& batch) {
  const auto& shape = exchange.shape;
  const Piece piece = PieceOf(pieces, batch.Item());
  const Received received = ReceivedToken(exchange, call, batch.Item() / pieces.n_pieces);
  const bool exists = batch.HasLane() && received.exists;
  const int64_t place = call.ListAt(exchange, kStartsHere, received.source) + received.order;
  const int64_t entry = place * pieces.n_pieces + piece.number;
  auto* flag = exists ? slot.flags + entry : nullptr;
  if (!AwaitFlags(exchange, call, flag, received.source)) return false;
  int32_t row = -1;
  uint64_t gate = 0;
  if (exists) {
    row = __ldcg(slot.numbers + entry * shape.NumberStride() + batch.choice);
    gate = __ldcg(reinterpret_cast<const unsigned long long*>(slot.gates) +
                  entry * shape.GateStride() + batch.choice);
    if (piece.number == 0) in.numbers[place * in.routing.top_k + batch.choice] = row;
  }
  Expand<W>(in, pieces, batch, slot.rows + place * shape.RowStride(), row, gate);
  return true;
}

// This rank's own tokens come first: they need no waiting.
template <typename W, typename AnyExchange>
__device__ __forceinline__ void ReceiveTokens(const AnyExchange& exchange, const ExchangeCall& call,
                                              const ThereArguments& in, const Pieces& pieces) {
  __shared__ int32_t longest;
  if (threadIdx.x == 0) longest = 0;
  const int32_t n_ranks = exchange.shape.n_ranks, top_k = in.routing.top_k;
  const int32_t n_own = in.routing.n_tokens * pieces.n_pieces;
  const int32_t at_once = ItemsAtOnce(n_own, top_k, W::kMostAtOnce);
  const int32_t own_turns = (n_own + at_once - 1) / at_once;
  Turns turns(&exchange.state->next_received);
  int32_t turn = turns.Take();
  for (; turn < own_turns; turn = turns.Take()) {
    ExpandOwn<W>(exchange, in, pieces, Batch(turn, at_once, n_own, top_k));
  }
  __syncthreads();
  const bool begun = AwaitHeaders(exchange, call, [&](int32_t source, int32_t size) {
    call.sizes[source] = size;
    atomicMax(&longest, size);
    if (call.part == 0) in.sizes[source] = size;
  });
  if (!begun) return;
  const int32_t n_items = longest * (n_ranks - 1) * pieces.n_pieces;
  const Slot<AnyExchange> slot = SlotOf(exchange, call, exchange.peers.rank);
  for (;; turn = turns.Take()) {
    const Batch batch(turn - own_turns, at_once, n_items, top_k);
    if (batch.begin == batch.end) return;
    if (!ExpandReceived<W>(exchange, call, in, pieces, slot, batch)) return;
  }
}

// The kernels. The first blocks send, `n_senders` of them; then all receive.
template <typename W, typename AnyExchange>
__device__ __forceinline__ void There(const AnyExchange& exchange, const ThereArguments& in,
                                      const Pieces& pieces, int32_t n_senders) {
  extern __shared__ char* memory[];
  const ExchangeCall call = BeginExchange(exchange, in.routing, memory);
  if (call.part == 0) {
    SendHeaders(exchange, call, call.lists + kSizesSent * exchange.shape.n_ranks);
  }
  if (!call.failed) {
    if (call.part < n_senders) SendTokens<W>(exchange, call, in, pieces, n_senders);
    ReceiveTokens<W>(exchange, call, in, pieces);
  }
  if (FinishExchange(exchange, call)) {
    FillRows(in.rows, in.first_row, in.row_bytes);
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
__device__ __forceinline__ typename Wide<T>::Type ElementOf(const uint4& word, int i) {
  return static_cast<typename Wide<T>::Type>(reinterpret_cast<const T*>(&word)[i]);
}
// The upper half of a float. With few SMs, sums take as long as their instructions.
template <>
__device__ __forceinline__ float ElementOf<__nv_bfloat16>(const uint4& word, int i) {
  const uint32_t two = reinterpret_cast<const uint32_t*>(&word)[i / 2];
  return __uint_as_float(i % 2 == 0 ? two << 16 : two & 0xffff0000u);
}

template <typename T>
struct Sum {
  static constexpr int kElements = kWord / sizeof(T);
  typename Wide<T>::Type of[kElements] = {};

  __device__ __forceinline__ void Add(uint4 word) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) of[i] += ElementOf<T>(word, i);
  }
  __device__ __forceinline__ uint4 Rounded() const {
    uint4 word;
    T* elements = reinterpret_cast<T*>(&word);
#pragma unroll
    for (int i = 0; i < kElements; ++i) elements[i] = static_cast<T>(of[i]);
    return word;
  }
};

// What a warp sums of a row at once, `words` per lane: each lane's from byte `begin` on, before
// `end`.
template <typename T, int words>
struct StepSums {
  Sum<T> of[words];

  __device__ __forceinline__ void Add(const uint4* terms, int stride) {
#pragma unroll
    for (int j = 0; j < words; ++j) of[j].Add(terms[j * stride]);
  }
  __device__ __forceinline__ void Round(uint4* rounded) const {
#pragma unroll
    for (int j = 0; j < words; ++j) rounded[j] = of[j].Rounded();
  }
  __device__ __forceinline__ void Store(char* to, int32_t begin, int32_t end) const {
#pragma unroll
    for (int j = 0; j < words; ++j) {
      StoreWide(to + begin + j * 32 * kWord, of[j].Rounded(), begin + j * 32 * kWord < end);
    }
  }
};

// A warp's part of the shared memory of a block that sums. The parts follow what an ExchangeCall
// keeps there.
template <typename W>
struct SumRoom {
  uint4 words[W::kFlightSums / kWord];
  const char* terms[kMostChoices];
};

template <typename W>
__device__ __forceinline__ SumRoom<W>* RoomOfWarp(int32_t n_ranks) {
  extern __shared__ char* memory[];  // and not from `call`, or the compiler would not know the kind
  char* rooms = reinterpret_cast<char*>(memory) + ExchangeCall::SharedBytes(n_ranks);
  return reinterpret_cast<SumRoom<W>*>(rooms) + threadIdx.x / 32;
}

// The terms of a sum on their way to shared memory, step by step, in the order in which they are
// added. There is room for more of them than in registers, so that a few SMs get as much as the
// link and the memory give. A lane fetches the words that it will add, and waits for no other's.
template <typename W, int words>
class Fetches {
 public:
  static constexpr int kMost = W::kFlightSums / (words * 32 * kWord);  // at once

  __device__ __forceinline__ Fetches(SumRoom<W>* room, int32_t n_terms, const Piece& piece)
      : room_(room), n_terms_(n_terms), end_(piece.begin + piece.bytes) {
    at_ = n_terms > 0 ? piece.begin + Lane() * kWord : end_;
  }
  // Starts the next fetch, if one is left.
  __device__ __forceinline__ void Start() {
    uint4* to = At(next_++);
    const char* from = room_->terms[term_] + at_;
#pragma unroll
    for (int j = 0; j < words; ++j) {
      FetchWide(to + j * 32, from + j * 32 * kWord, at_ + j * 32 * kWord < end_);
    }
    CommitFetches();
    if (++term_ < n_terms_) return;
    term_ = 0;
    at_ += words * 32 * kWord;
  }
  // This lane's words of the term whose fetch was started kMost − 1 calls ago, 32 words apart.
  __device__ __forceinline__ const uint4* Take() {
    Start();
    AwaitFetches<kMost - 1>();
    return At(next_);
  }

 private:
  __device__ __forceinline__ uint4* At(uint32_t fetch) const {
    return room_->words + fetch % kMost * (words * 32) + Lane();
  }

  SumRoom<W>* room_;
  int32_t n_terms_;
  int32_t end_;
  int32_t at_;        // where this lane's next words are in a term
  int32_t term_ = 0;  // the next one
  uint32_t next_ = 0;
};

// The terms of a sum: those of this rank's rows, which are summed and rounded first, and those that
// come before and after their sum.
struct Terms {
  int32_t n_own;
  int32_t n_first;  // with own ones
  int32_t n;
};

template <typename T, int words, typename W, typename Ready>
__device__ __forceinline__ bool SumSteps(SumRoom<W>* room, const Piece& piece, const Terms& terms,
                                         char* to, int32_t n_early, const Ready& ready) {
  using Steps = Fetches<W, words>;
  Steps fetches(room, terms.n, piece);
  int32_t n_started = 0;
  for (; n_started < min(n_early, Steps::kMost - 1); ++n_started) fetches.Start();
  if (!ready()) return false;
  for (; n_started < Steps::kMost - 1; ++n_started) fetches.Start();
  const int32_t end = piece.begin + piece.bytes;
  for (int32_t step = piece.begin; step < end; step += words * 32 * kWord) {
    StepSums<T, words> sums;
    const auto add = [&](int32_t n) {
#pragma unroll 1
      for (int32_t i = 0; i < n; ++i) sums.Add(fetches.Take(), 32);
    };
    if (terms.n_own > 0) {
      add(terms.n_own);
      uint4 own_sum[words];
      sums.Round(own_sum);
      sums = {};
      add(terms.n_first - terms.n_own);
      sums.Add(own_sum, 1);
    } else {
      add(terms.n_first);
    }
    add(terms.n - terms.n_first);
    sums.Store(to, step + Lane() * kWord, end);
  }
  return true;
}

// Sums a piece. Each lane holds the address of a term. `lanes` is the mask of those to add, in
// their order; the terms of `own` are summed and rounded first, and added where the first of them
// is. `ready` is called once, while `n_early` terms are being fetched, and returns false if the
// others will not come.
template <typename T, typename W, typename Ready>
__device__ __forceinline__ bool SumPiece(SumRoom<W>* room, const Piece& piece, const char* term,
                                         uint32_t lanes, uint32_t own, char* to, int32_t n_early,
                                         const Ready& ready) {
  const uint32_t first = lanes & ((own & -own) - 1);  // all if there are no own ones
  const uint32_t last = lanes & ~first & ~own;
  const int32_t n_own = __popc(own), n_first = n_own + __popc(first);
  const auto place = [&](uint32_t of, int32_t begin) {
    const int32_t before = __popc(of & ((1u << Lane()) - 1));
    if ((of >> Lane() & 1) != 0) room->terms[begin + before] = term;
  };
  __syncwarp();
  place(own, 0);
  place(first, n_own);
  place(last, n_first);
  __syncwarp();
  const Terms terms = {n_own, n_first, n_first + __popc(last)};
  // Long steps take fewer instructions, which few SMs feel; of short ones, more are in flight.
  if (piece.bytes > kPieceUnit) return SumSteps<T, 4>(room, piece, terms, to, n_early, ready);
  return SumSteps<T, 2>(room, piece, terms, to, n_early, ready);
}

// The row numbers of a received token, one per lane; −1 for none.
__device__ __forceinline__ int32_t LoadNumber(const Routing& routing, const int32_t* numbers,
                                              const Received& received, int64_t place) {
  if (!received.exists || Lane() >= routing.top_k) return -1;
  return __ldg(numbers + place * routing.top_k + Lane());
}

// Sends a piece of the sum over a received token's rows back to the rank that sent the token.
template <typename T, typename W, typename AnyExchange>
__device__ __forceinline__ void SendSum(const AnyExchange& exchange, const ExchangeCall& call,
                                        const BackArguments& in, const Pieces& pieces,
                                        const Piece& piece, int32_t rank, int64_t place,
                                        int64_t arrives, int32_t row, SumRoom<W>* room,
                                        Outbox<AnyExchange>* outbox) {
  const auto& shape = exchange.shape;
  const Slot<AnyExchange> slot = outbox->SlotTo(exchange, call, rank);
  char* to = slot.rows + place * shape.RowStride();
  const uint32_t rows = __ballot_sync(kFullWarp, row >= 0);
  uint64_t gate = 0;
  if (row >= 0 && piece.number == 0) gate = LoadGate(in.row_gates, row, in.gate_bytes);
  if (__popc(rows) == 1) {
    const int32_t only = __shfl_sync(kFullWarp, row, __ffs(rows) - 1);
    CopyPiece<W>(RowAt(in.rows, only, in.row_bytes), piece, Lane() == 0 ? to : nullptr,
                 [&] { outbox->LeaveIfMany(call); });
  } else {
    SumPiece<T>(room, piece, RowAt(in.rows, row, in.row_bytes), rows, 0, to, kMostChoices, [&] {
      outbox->LeaveIfMany(call);
      return true;
    });
  }
  const int64_t entry = place * pieces.n_pieces + piece.number;
  if (row >= 0 && piece.number == 0) slot.gates[entry * shape.GateStride() + Lane()] = gate;
  outbox->Add(exchange, call, pieces, Lane() == 0, slot, entry, rank, arrives);
}

template <typename T, typename W, typename AnyExchange>
__device__ __forceinline__ void SendSums(const AnyExchange& exchange, const ExchangeCall& call,
                                         const BackArguments& in, const Pieces& pieces,
                                         int32_t n_senders, SumRoom<W>* room) {
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
  Outbox<AnyExchange> outbox(pieces, n_items / n_warps / W::kFences);
  for (; item < n_items; item += n_warps) {
    const Received next = received_of(item + n_warps);
    const int32_t next_row = row_of(next);
    if (received.exists) {
      SendSum<T, W>(exchange, call, in, pieces, PieceOf(pieces, item), received.source,
                    place_of(received, outbox.kBack), place_of(received, kStartsHome), row, room,
                    &outbox);
    }
    received = next;
    row = next_row;
  }
  outbox.Leave(call);
}

// Sums the ranks' results for this rank's tokens. Each lane holds the address of its choice's row,
// or of what the choice's rank has sent. This rank's rows are fetched before the first flags come.
template <typename T, typename W, typename AnyExchange>
__device__ __forceinline__ bool ReceiveSums(const AnyExchange& exchange, const ExchangeCall& call,
                                            const BackArguments& in, const Pieces& pieces,
                                            const Batch& batch, SumRoom<W>* room) {
  const Routing& routing = in.routing;
  const auto& shape = exchange.shape;
  const Piece lane_piece = PieceOf(pieces, batch.Item());
  const int32_t token = batch.HasLane() ? batch.Item() / pieces.n_pieces : routing.n_tokens;
  const Choice choice = LoadChoice(routing, token, batch.choice).Unpacked(routing);
  const bool own = choice.rank == exchange.peers.rank;
  const bool remote = choice.rank >= 0 && !own;
  // All of a token's choices on a rank share the place of the first.
  const int32_t token_and_rank = batch.number * shape.n_ranks + choice.rank;
  const int32_t key = choice.rank < 0 ? -1 : token_and_rank;
  const int first = __ffs(__match_any_sync(kFullWarp, key)) - 1;
  const int32_t order = __shfl_sync(kFullWarp, choice.order, first);
  const Slot<AnyExchange> slot = SlotOf(exchange, call, exchange.peers.rank);
  const char* term = RowAt(in.rows, choice.row, in.row_bytes);
  int32_t place = 0;
  if (remote) {
    place = call.ListAt(exchange, kStartsReturn, choice.rank) + order;
    term = slot.rows + int64_t{place} * shape.RowStride();
  }
  const bool is_term = choice.rank >= 0 && Lane() == first;
  const uint32_t own_rows = __ballot_sync(kFullWarp, own);
  const uint32_t terms = __ballot_sync(kFullWarp, is_term);
  auto* flag = slot.flags + int64_t{place} * pieces.n_pieces + lane_piece.number;
  for (int32_t item = batch.begin; item < batch.end; ++item) {
    const Piece piece = PieceOf(pieces, item);
    const uint32_t lanes = batch.LanesOf(item, routing.top_k);
    char* to = RowAt(in.tokens, item / pieces.n_pieces, in.row_bytes);
    const auto ready = [&] {
      if (item != batch.begin) return true;
      return AwaitFlags(exchange, call, is_term && remote ? flag : nullptr, choice.rank);
    };
    const uint32_t own_lanes = own_rows & lanes;
    if (in.spares_empty && (terms & lanes) == 0) {
      if (!ready()) return false;  // for the whole batch
      continue;
    }
    if (own_lanes == 0 && __popc(terms & lanes) == 1) {
      if (!ready()) return false;
      const int from = __ffs(terms & lanes) - 1;
      const auto only = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(term), from);
      CopyPiece<W>(reinterpret_cast<const char*>(only), piece, Lane() == 0 ? to : nullptr, [] {});
    } else if (!SumPiece<T>(room, piece, term, terms & lanes, own_lanes, to, __popc(own_lanes),
                            ready)) {
      return false;
    }
  }
  if (batch.HasLane() && lane_piece.number == 0) {
    uint64_t gate = 0;
    if (own) gate = LoadGate(in.row_gates, choice.row, in.gate_bytes);
    if (remote) {
      const int64_t i = int64_t{place} * pieces.n_pieces * shape.GateStride() + batch.choice;
      const uint64_t* gates = slot.gates;
      gate = __ldcg(reinterpret_cast<const unsigned long long*>(gates) + i);
    }
    const int64_t i = static_cast<int64_t>(token) * routing.top_k + batch.choice;
    StoreGate(in.gates, i, in.gate_bytes, gate);
  }
  return true;
}

template <typename T, typename W, typename AnyExchange>
__device__ __forceinline__ void Back(const AnyExchange& exchange, const BackArguments& in,
                                     const Pieces& pieces, int32_t n_senders) {
  extern __shared__ char* memory[];
  const ExchangeCall call = BeginExchange(exchange, in.routing, memory, in.sizes);
  if (call.part == 0) SendHeaders(exchange, call, call.sizes);
  if (!call.failed) {
    SumRoom<W>* room = RoomOfWarp<W>(exchange.shape.n_ranks);
    if (call.part < n_senders) SendSums<T, W>(exchange, call, in, pieces, n_senders, room);
    const int32_t n_items = in.routing.n_tokens * pieces.n_pieces, top_k = in.routing.top_k;
    const int32_t at_once = ItemsAtOnce(n_items, top_k, W::kMostAtOnce);
    Turns turns(&exchange.state->next_received);
    for (;;) {
      const Batch batch(turns.Take(), at_once, n_items, top_k);
      if (batch.begin == batch.end) break;
      if (!ReceiveSums<T, W>(exchange, call, in, pieces, batch, room)) break;
    }
    // Also waits for ranks that send nothing, see WindowShape.
    if (call.part == 0) AwaitHeaders(exchange, call, [](int32_t, int32_t) {});
  }
  if (FinishExchange(exchange, call)) {
    const int64_t n_tokens = in.routing.n_tokens;
    FillRows(in.tokens, 0, in.row_bytes);
    FillOnes(in.gates, n_tokens * in.routing.top_k * in.gate_bytes);
  }
}

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_EXCHANGE_KERNELS_CUH_
