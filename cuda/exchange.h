// Tokens to the ranks of their slots and back, through memory that the ranks map from one another,
// or by NVSHMEM's put.
// Pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_EXCHANGE_H_
#define LPLB_CUDA_EXCHANGE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/sync.h"

namespace lplb::cuda {

constexpr int32_t kMostChoices = 32;  // Per token: one per lane.
constexpr int32_t kMinItems = 4096;   // Fewer tokens are cut into pieces, up to this many items.
constexpr int32_t kPutThreads = 512;  // per block of the kernels that send by put, at most
constexpr int32_t kMostArrays = 4;    // that travel together

// What a rank keeps between exchanges, in device memory. Initially zero.
struct ExchangeState {
  uint32_t epoch;          // exchanges so far
  uint32_t started;        // blocks that started this one; 0 between exchanges, like those below
  uint32_t finished;       // blocks that finished it
  uint32_t next_received;  // the next items to receive, in turns
};

// What a window has room for.
struct WindowSizes {
  int32_t n_ranks;
  int32_t n_tokens;
  int32_t top_k;
  int32_t row_bytes;  // a multiple of 16
};

// A window: two slots, used in turn, each with room for `n_tokens` rows. A row travels with the
// numbers of the rows it expands to, their gates, and a flag. The flag is the epoch, written last,
// so a rank that sees it has the row. A small batch is cut into pieces, so that more warps move it.
// Each piece has its own entry for numbers, gates and flag.
//
// Two slots suffice. In the header, a rank tells every other rank that it has begun epoch e + 1,
// even if it sends no tokens there. No rank ends e + 1 before it has heard this from all. On a
// rank's stream, e + 1 begins only after e has ended and its slot has been read. So a rank that
// begins e + 2 may overwrite what was sent in e. Other work on the stream does not matter, nor
// which exchanges go there and which back. But all ranks must make the same exchanges in the same
// order, as with any collective.
struct WindowShape : WindowSizes {
  using Flag = uint32_t;

  __host__ __device__ int64_t Entries() const {
    return n_tokens > kMinItems ? n_tokens : kMinItems;
  }
  // Offsets in a slot. The arrays with larger words come first.
  __host__ __device__ static char* Rows(char* slot) { return slot; }
  __host__ __device__ int64_t GatesAt() const { return int64_t{n_tokens} * row_bytes; }
  __host__ __device__ int64_t HeadersAt() const { return GatesAt() + Entries() * top_k * 8; }
  __host__ __device__ int64_t NumbersAt() const { return HeadersAt() + int64_t{n_ranks} * 8; }
  __host__ __device__ int64_t FlagsAt() const { return NumbersAt() + Entries() * top_k * 4; }
  __host__ __device__ int64_t SlotBytes() const {
    return (FlagsAt() + Entries() * 4 + 127) / 128 * 128;
  }
  __host__ __device__ int64_t Bytes() const { return 2 * SlotBytes(); }
  // From one row, or from one entry's gates or numbers, to the next; in bytes and elements.
  __host__ __device__ int32_t RowStride() const { return row_bytes; }
  __host__ __device__ int32_t GateStride() const { return top_k; }
  __host__ __device__ int32_t NumberStride() const { return top_k; }
};

// The window where ranks send by NVSHMEM's put, which writes one range of memory and then a signal,
// a 64-bit word, that announces this range only. So a token's gates, numbers and row lie together,
// in a parcel, and its flag is a signal. Parcels are whole cache lines: a rank's own warps, which
// pack neighbouring ones, share none. Rows are not cut.
//
// Behind the two slots for what comes lie two more, in which parcels are packed. A put reads its
// parcel some time after the call, but before the receiver sees the signal, and the receiver ends
// an epoch only after it has seen all of them. So whatever lets a rank overwrite what it sent in e,
// see above, lets it overwrite what it packed in e, and no put needs to be awaited. Where a parcel
// is packed: a token at its place on the way back, a sum at the place at which its token came. No
// two parcels have the same, and all are less than n_tokens.
struct PutWindowShape : WindowSizes {
  using Flag = uint64_t;

  __host__ __device__ int32_t RowAt() const { return (top_k * 12 + 15) / 16 * 16; }  // in a parcel
  __host__ __device__ int32_t ParcelBytes() const {
    return (RowAt() + row_bytes + 127) / 128 * 128;
  }
  __host__ __device__ char* Rows(char* slot) const { return slot + RowAt(); }
  __host__ __device__ int64_t GatesAt() const { return 0; }
  __host__ __device__ int64_t NumbersAt() const { return int64_t{top_k} * 8; }
  __host__ __device__ int64_t HeadersAt() const { return int64_t{n_tokens} * ParcelBytes(); }
  __host__ __device__ int64_t FlagsAt() const { return HeadersAt() + int64_t{n_ranks} * 8; }
  __host__ __device__ int64_t SlotBytes() const {
    return (FlagsAt() + int64_t{n_tokens} * 8 + 127) / 128 * 128;
  }
  __host__ __device__ int64_t Bytes() const { return 4 * SlotBytes(); }
  __host__ __device__ int32_t RowStride() const { return ParcelBytes(); }
  __host__ __device__ int32_t GateStride() const { return ParcelBytes() / 8; }
  __host__ __device__ int32_t NumberStride() const { return ParcelBytes() / 4; }
};

// A rank's part in exchanges. `peers` holds its number, the timeout, and where failures are
// reported.
struct Exchange {
  Peers peers;
  WindowShape shape;
  char* const* windows;  // [n_ranks], in device memory; this rank's own is one of them
  ExchangeState* state;
};

// The same where it sends by put. A window is the same object of the symmetric heap in every
// process, so `windows` holds this rank's own for all ranks.
struct PutExchange {
  Peers peers;
  PutWindowShape shape;
  char* const* windows;
  ExchangeState* state;
  const int32_t* pes;  // [n_ranks], in device memory
};

// Where this rank's tokens go, in both directions. Between two ranks there is a list of tokens, in
// the order of the source's tokens; a place is a token's position in a window.
struct Routing {
  const int32_t* rank;   // [], checked against peers.rank
  const int32_t* row;    // [n_tokens, top_k], rank · capacity + row on that rank; −1 for none
  const int32_t* order;  // [n_tokens, top_k], place in the list to that rank; −1 if an earlier
                         // choice of the token goes to the same rank, or if it is this rank
  const int32_t* lists;  // [kLists, n_ranks], see below
  int32_t n_tokens;
  int32_t top_k;
  int32_t capacity;    // rows per rank
  int32_t n_received;  // tokens that others may send here
};

// Rows of Routing::lists.
enum List : int32_t {
  kSizesSent,     // tokens sent to each rank
  kStartsThere,   // where they begin in that rank's window
  kStartsHere,    // where the tokens from each rank begin in this rank's window
  kStartsHome,    // on the way back: where they begin in that rank's window
  kStartsReturn,  // and where what this rank sent begins in its own window
  kLists
};

// Receivers wait for senders, here and on other ranks, and senders start first. So a rank that has
// its GPU alone makes progress as soon as its senders run, about half of its blocks, one per SM: a
// kernel on another stream that holds SMs until other ranks reach it, such as NCCL's, may delay the
// rest.
// Ranks that share a GPU need room for all their blocks at once.
struct ExchangeOptions {
  int32_t n_blocks;
  int32_t n_senders;  // Blocks that send first; the others receive at once. 0: as is fastest.
};

// For a GPU that serves one rank, on at most n_sms of its SMs.
ExchangeOptions ChooseOptions(const Routing& routing, int32_t n_ranks, int32_t row_bytes,
                              int32_t n_sms);

// The element type of rows, for sums.
enum class RowType : int32_t { kBFloat16, kFloat16, kFloat32, kFloat64 };
constexpr int32_t kRowTypes = 4;

// Rows in one array, or in several of equal width. With several, rows belong to entries, such as
// experts: all entries have the same number of rows in an array, and an entry's rows are numbered
// through the arrays. So all rows are one list, as if the arrays were joined along their second
// axis, and one exchange moves them. With `listed`, the rows are only those of the entries that it
// lists, one after the other.
template <typename Byte>
struct RowArrays {
  Byte* data[kMostArrays];
  int32_t rows[kMostArrays];  // of an entry, in each array
  int32_t n_arrays;
  int32_t per_entry;  // rows in all arrays
  int32_t n_entries;
  const int32_t* listed;  // may be null
};

// Tokens to rows. Rows [capacity, row_bytes] and row_gates [capacity] without a token are left
// unchanged. For the way back it returns numbers [n_received, top_k], the rows of each received
// token by place, −1 for choices on other ranks; and sizes [n_ranks], the number of tokens from
// each rank. After a failure all bits of rows and gates are set, which is NaN in any type, but not
// of rows before first_row. These may be the tokens themselves, if no token comes to them.
struct ThereArguments {
  Routing routing;
  RowArrays<const char> tokens;  // [n_tokens, row_bytes]
  const void* gates;             // [n_tokens, top_k] of gate_bytes
  RowArrays<char> rows;
  void* row_gates;
  int32_t* numbers;
  int32_t* sizes;
  int32_t row_bytes;
  int32_t gate_bytes;  // 2, 4 or 8; 0 without gates
  int32_t first_row;
};

// Rows to tokens, the transpose. Sums are in float32 (float64 for float64): first over a rank's
// rows, then rounded, then over ranks, both in the order of a token's choices. The gates' gradients
// return to their choices. Choices without a row add nothing; tokens without any are 0, or, with
// spares_empty, left unchanged.
struct BackArguments {
  Routing routing;
  RowArrays<const char> rows;  // [capacity, row_bytes]
  const void* row_gates;       // [capacity] of gate_bytes
  const int32_t* numbers;
  const int32_t* sizes;
  RowArrays<char> tokens;  // [n_tokens, row_bytes]
  void* gates;             // [n_tokens, top_k]
  int32_t row_bytes;
  int32_t gate_bytes;
  RowType type;
  bool spares_empty;
};

cudaError_t LaunchThere(const Exchange& exchange, const ThereArguments& arguments,
                        const ExchangeOptions& options, cudaStream_t stream);
cudaError_t LaunchBack(const Exchange& exchange, const BackArguments& arguments,
                       const ExchangeOptions& options, cudaStream_t stream);

// The same with `kernel` of nvshmem/exchange_put.cu; for LaunchBackPut, the one of arguments.type.
cudaError_t LaunchTherePut(const void* kernel, const PutExchange& exchange,
                           const ThereArguments& arguments, const ExchangeOptions& options,
                           cudaStream_t stream);
cudaError_t LaunchBackPut(const void* kernel, const PutExchange& exchange,
                          const BackArguments& arguments, const ExchangeOptions& options,
                          cudaStream_t stream);

// Like PreloadSync.
cudaError_t PreloadExchange();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_EXCHANGE_H_
