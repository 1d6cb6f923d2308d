// Tokens to the ranks of their slots and back, through memory that the ranks map of one another:
// pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_EXCHANGE_H_
#define LPLB_CUDA_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/sync.h"

namespace lplb::cuda {

constexpr int32_t kMostChoices = 32;  // Of a token: a lane each.
constexpr int32_t kMinItems = 4096;   // Fewer tokens are cut into pieces, up to so many.

// What a rank keeps between exchanges, in device memory; zero at first.
struct ExchangeState {
  uint32_t epoch;          // exchanges so far
  uint32_t started;        // blocks of this one; 0 between exchanges, as all that follow
  uint32_t finished;       // likewise
  uint32_t next_received;  // item to receive
};

// A window: two slots, taken in turn, each with room for `n_tokens` rows. With a row go the numbers
// of the rows that it becomes, their gates, and a flag: the epoch, written after the others, so
// that whoever sees the flag has the row. Few tokens are cut into pieces, for more warps to move
// them; each piece has an entry of its own for numbers, gates and flag.
//
// Two slots suffice. A rank tells every other one, in the header, that it has begun epoch e + 1,
// whether or not it has tokens for it, and no rank ends e + 1 before it has heard so from all. On a
// rank's stream e + 1 begins when e has ended, and so has read its slot: whoever begins e + 2 may
// overwrite what was sent in e. It does not matter what else is on the stream, or which exchanges
// go there and which back. All must be the same on all ranks and in one order, as any collective.
struct WindowShape {
  int32_t n_ranks;
  int32_t n_tokens;
  int32_t top_k;
  int32_t row_bytes;  // a multiple of 16

  __host__ __device__ int64_t Entries() const {
    return n_tokens > kMinItems ? n_tokens : kMinItems;
  }
  // Of a slot, from its begin; what holds larger words first.
  __host__ __device__ int64_t GatesAt() const { return int64_t{n_tokens} * row_bytes; }
  __host__ __device__ int64_t HeadersAt() const { return GatesAt() + Entries() * top_k * 8; }
  __host__ __device__ int64_t NumbersAt() const { return HeadersAt() + int64_t{n_ranks} * 8; }
  __host__ __device__ int64_t FlagsAt() const { return NumbersAt() + Entries() * top_k * 4; }
  __host__ __device__ int64_t SlotBytes() const {
    return (FlagsAt() + Entries() * 4 + 127) / 128 * 128;
  }
  __host__ __device__ int64_t Bytes() const { return 2 * SlotBytes(); }
};

// A rank's part in exchanges. `peers` says who it is, how long it waits, and where failures go.
struct Exchange {
  Peers peers;
  WindowShape shape;
  char* const* windows;  // [n_ranks], in device memory; this rank's own is one of them
  ExchangeState* state;
};

// Where this rank's tokens go, the same there and back. Places are those of tokens in windows:
// between two ranks a list, in the order of the source's tokens.
struct Routing {
  const int32_t* rank;   // [], checked against peers.rank
  const int32_t* row;    // [n_tokens, top_k], rank · capacity + row there; −1 for none
  const int32_t* order;  // [n_tokens, top_k], place in the list to that rank; −1 where an earlier
                         // choice of the token goes there, too, or where it is this rank
  const int32_t* lists;  // [kLists, n_ranks], see below
  int32_t n_tokens;
  int32_t top_k;
  int32_t capacity;    // rows of a rank
  int32_t n_received;  // tokens that others may send here
};

// Rows of Routing::lists.
enum List : int32_t {
  kSizesSent,     // tokens to each rank
  kStartsThere,   // where they begin in that rank's window
  kStartsHere,    // where those of each rank begin in this rank's window
  kStartsHome,    // on the way back: where they begin in that rank's window
  kStartsReturn,  // and where what this rank sent begins in its own
  kLists
};

// Blocks wait for one another, also for those of other ranks that share the GPU: all must fit on it
// at once, one on an SM.
struct ExchangeOptions {
  int32_t n_blocks;
  int32_t n_senders;  // Blocks that send first; the others receive at once.
};

// For one rank on a GPU, on at most n_sms of its SMs.
ExchangeOptions ChooseOptions(const Routing& routing, int32_t n_ranks, int32_t row_bytes,
                              int32_t n_sms);

// The type of rows' elements, for sums.
enum class RowType : int32_t { kBFloat16, kFloat16, kFloat32, kFloat64 };

// Tokens to rows: rows [capacity, row_bytes], of which those without a token are left as they are,
// and row_gates [capacity] likewise. For the way back, numbers [n_received, top_k], the rows of
// each token that came, by place; −1 for choices that are others'; and sizes [n_ranks], how many
// came from each rank. After a failure all bits of rows and gates are set, which is NaN in any
// type.
struct ThereArguments {
  Routing routing;
  const void* tokens;  // [n_tokens, row_bytes]
  const void* gates;   // [n_tokens, top_k] of gate_bytes
  void* rows;
  void* row_gates;
  int32_t* numbers;
  int32_t* sizes;
  int32_t row_bytes;
  int32_t gate_bytes;  // 2, 4 or 8; 0 where there are no gates
};

// Rows to tokens, the transpose: sums in float32 (float64 of float64), first of a rank's rows,
// rounded, then of the ranks, both in the order of a token's choices; and the gates' gradients,
// each to its choice. Choices without a row add nothing.
struct BackArguments {
  Routing routing;
  const void* rows;       // [capacity, row_bytes]
  const void* row_gates;  // [capacity] of gate_bytes
  const int32_t* numbers;
  const int32_t* sizes;
  void* tokens;  // [n_tokens, row_bytes]
  void* gates;   // [n_tokens, top_k]
  int32_t row_bytes;
  int32_t gate_bytes;
  RowType type;
};

cudaError_t LaunchThere(const Exchange& exchange, const ThereArguments& arguments,
                        const ExchangeOptions& options, cudaStream_t stream);
cudaError_t LaunchBack(const Exchange& exchange, const BackArguments& arguments,
                       const ExchangeOptions& options, cudaStream_t stream);

// As PreloadSync.
cudaError_t PreloadExchange();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_EXCHANGE_H_
