// Tokens to rows on all ranks, and rows back to tokens, where ranks map one another's windows.
#include <algorithm>

#include "cuda/exchange_kernels.cuh"
#include "cuda/launch.cuh"

namespace lplb::cuda {

__device__ __forceinline__ void SendHeader(const Exchange&, int32_t, uint64_t* header,
                                           uint64_t value) {
  StoreWord(header, value);
}

__device__ __forceinline__ bool HasCome(const Exchange&, const uint32_t* flag, uint32_t epoch) {
  return LoadAcquired(flag) == epoch;
}

// Rows are written where they arrive; what leaves are their flags. A fence waits until everything
// written before it has arrived, which takes as long as a row. So several rows share one fence,
// while the next row loads; but not where a warp sends so few that receivers would wait for them.
template <>
class Outbox<Exchange> {
 public:
  static constexpr List kThere = kStartsThere;
  static constexpr List kBack = kStartsHome;

  __device__ __forceinline__ static Slot<Exchange> SlotTo(const Exchange& exchange,
                                                          const ExchangeCall& call, int32_t rank) {
    return SlotOf(exchange, call, rank);
  }
  __device__ __forceinline__ Outbox(const Pieces& pieces, int32_t rows_per_fence)
      : rows_per_fence_(RowsPerFence(pieces, rows_per_fence)) {
    __shared__ uint32_t* flags[kMostWarps][kMostFlags];
    flags_ = flags[threadIdx.x / 32];
  }
  __device__ __forceinline__ void Add(const Exchange&, const ExchangeCall&, const Pieces&,
                                      bool sends, const Slot<Exchange>& slot, int64_t entry,
                                      int32_t, int64_t) {
    uint32_t* flag = sends ? slot.flags + entry : nullptr;
    const uint32_t lanes = __ballot_sync(kFullWarp, flag != nullptr);
    const uint32_t before = lanes & ((1u << Lane()) - 1);
    if (flag != nullptr) flags_[n_flags_ + __popc(before)] = flag;
    n_flags_ += __popc(lanes);
    ++n_rows_;
  }
  __device__ __forceinline__ void LeaveIfMany(const ExchangeCall& call) {
    if (n_rows_ >= rows_per_fence_ || n_flags_ > kMostFlags - 32) Leave(call);
  }
  __device__ __forceinline__ void Leave(const ExchangeCall& call) {
    __syncwarp();
    asm volatile("fence.acq_rel.sys;" ::: "memory");
    for (int32_t i = Lane(); i < n_flags_; i += 32) StoreWord(flags_[i], call.epoch);
    __syncwarp();
    n_flags_ = n_rows_ = 0;
  }

 private:
  static constexpr int32_t kMostFlags = 64;
  // Rows that share a fence.
  static constexpr int32_t kMostRows = 4;
  static constexpr int32_t kPerFence = 4096;  // bytes that take as long as a fence

  __device__ __forceinline__ static int32_t RowsPerFence(const Pieces& pieces, int32_t wanted) {
    const int32_t least = (kPerFence + pieces.piece_bytes - 1) / pieces.piece_bytes;
    return min(max(wanted, least), kMostRows);
  }

  uint32_t** flags_;
  int32_t rows_per_fence_;
  int32_t n_flags_ = 0;
  int32_t n_rows_ = 0;
};

namespace {

constexpr int32_t kItemsPerBlock = 8;  // Below this, starting more blocks costs more than it saves.
// The fastest of those tried. Tokens with one row each are only copied. There, receivers have their
// own tokens to begin with; who sums needs what others send from the first token on.
using Copying = Way<768, 8, 4096, 4, 2>;
using Expanding = Way<640, 8, 0, 2, 2>;
using Summing = Way<640, 8, 8192, 4, 12>;

bool OnlyCopies(const Routing& routing) { return routing.top_k == 1; }

template <typename W>
__global__ void __launch_bounds__(W::kThreads, 1)
    ThereKernel(const Exchange exchange, const ThereArguments in, const Pieces pieces,
                int32_t n_senders) {
  There<W>(exchange, in, pieces, n_senders);
}

template <typename T, typename W>
__global__ void __launch_bounds__(W::kThreads, 1)
    BackKernel(const Exchange exchange, const BackArguments in, const Pieces pieces,
               int32_t n_senders) {
  Back<T, W>(exchange, in, pieces, n_senders);
}

template <typename Arguments>
struct Kernel {
  void (*function)(const Exchange, const Arguments, const Pieces, int32_t);
  int32_t threads;
  int64_t room;  // shared memory per warp
};

Kernel<ThereArguments> ThereKernelFor(const Routing& routing) {
  if (OnlyCopies(routing)) return {ThereKernel<Copying>, Copying::kThreads, 0};
  return {ThereKernel<Expanding>, Expanding::kThreads, 0};
}

template <typename T>
Kernel<BackArguments> BackKernelOf(const Routing& routing) {
  if (OnlyCopies(routing)) {
    return {BackKernel<T, Copying>, Copying::kThreads, sizeof(SumRoom<Copying>)};
  }
  return {BackKernel<T, Summing>, Summing::kThreads, sizeof(SumRoom<Summing>)};
}

Kernel<BackArguments> BackKernelFor(const Routing& routing, RowType type) {
  switch (type) {
    case RowType::kBFloat16:
      return BackKernelOf<__nv_bfloat16>(routing);
    case RowType::kFloat16:
      return BackKernelOf<__half>(routing);
    case RowType::kFloat32:
      return BackKernelOf<float>(routing);
    case RowType::kFloat64:
      return BackKernelOf<double>(routing);
  }
  return {};
}

// Depends on sizes only, so that all ranks cut alike, and never makes more pieces than there are
// entries. A piece is a multiple of what a warp sums at once.
Pieces PiecesOf(const Routing& routing, int32_t n_ranks, int32_t row_bytes) {
  const int32_t most_tokens =
      std::max(routing.n_received, routing.n_tokens * std::min(routing.top_k, n_ranks));
  const int32_t steps = (row_bytes + kPieceUnit - 1) / kPieceUnit;
  const int32_t n_pieces = std::clamp(kMinItems / std::max(most_tokens, 1), 1, steps);
  const int32_t piece_bytes = (steps + n_pieces - 1) / n_pieces * kPieceUnit;
  return {row_bytes, (row_bytes + piece_bytes - 1) / piece_bytes, piece_bytes};
}

// Measured: with half of 16 blocks, copies take 7 % longer.
int32_t Senders(const Routing& routing, const ExchangeOptions& options) {
  if (options.n_senders > 0) return options.n_senders;
  return OnlyCopies(routing) ? (9 * options.n_blocks + 8) / 16 : (options.n_blocks + 1) / 2;
}

// The most threads, in whole warps, whose rooms fit in the shared memory of the current device.
cudaError_t ShapeBlock(int32_t n_ranks, int64_t room, LaunchShape* shape) {
  constexpr int64_t kStaticBytes = 17 << 10;  // what kernels use at most beside rooms and calls
  int device = 0, most_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  shape->shared_bytes = ExchangeCall::SharedBytes(n_ranks);
  if (room == 0) return cudaSuccess;
  const int64_t rooms = (most_bytes - kStaticBytes - shape->shared_bytes) / room;
  const int64_t warps = std::clamp<int64_t>(rooms, 1, shape->threads / 32);
  shape->threads = static_cast<int32_t>(32 * warps);
  shape->shared_bytes += warps * room;
  return cudaSuccess;
}

// Senders write a token's row to at most `ranks` windows, receivers top_k rows per token of a rank,
// and an SM writes only 32 bytes per clock. Measured on two ranks with top-8: a quarter of the
// blocks is as fast as fewer, and with more of them receivers end later, by up to 17 %. Batches
// that are cut are so small that this does not matter, but how soon the last token leaves.
int32_t SendersThere(const Routing& routing, const ExchangeOptions& options, int32_t n_ranks,
                     const Pieces& pieces) {
  const int32_t senders = Senders(routing, options);
  if (options.n_senders > 0 || OnlyCopies(routing) || pieces.n_pieces > 1) return senders;
  const int32_t ranks = std::min(n_ranks - 1, routing.top_k), of = ranks + routing.top_k;
  return std::min(senders, (options.n_blocks * (ranks + 1) + of - 1) / of);
}

// Whether a window has room for what others may send here: a kernel would write past it.
template <typename Arguments>
bool Fits(const Arguments& arguments, const WindowSizes& window) {
  return arguments.routing.n_received <= window.n_tokens &&
         arguments.routing.top_k <= window.top_k && arguments.row_bytes <= window.row_bytes;
}

template <typename Arguments>
cudaError_t LaunchExchange(const Kernel<Arguments>& kernel, const Exchange& exchange,
                           const Arguments& arguments, const ExchangeOptions& options,
                           const Pieces& pieces, int32_t n_senders, cudaStream_t stream) {
  if (!Fits(arguments, exchange.shape)) return cudaErrorInvalidValue;
  LaunchShape shape = {dim3(options.n_blocks), kernel.threads};
  const cudaError_t error = ShapeBlock(exchange.shape.n_ranks, kernel.room, &shape);
  if (error != cudaSuccess) return error;
  return Launch(kernel.function, shape, stream, exchange, arguments, pieces, n_senders);
}

}  // namespace

ExchangeOptions ChooseOptions(const Routing& routing, int32_t n_ranks, int32_t row_bytes,
                              int32_t n_sms) {
  const int64_t n_items =
      int64_t{PiecesOf(routing, n_ranks, row_bytes).n_pieces} * routing.n_tokens;
  const auto n_blocks = static_cast<int32_t>(
      std::clamp<int64_t>((n_items + kItemsPerBlock - 1) / kItemsPerBlock, 1, n_sms));
  return {n_blocks, 0};
}

cudaError_t LaunchThere(const Exchange& exchange, const ThereArguments& arguments,
                        const ExchangeOptions& options, cudaStream_t stream) {
  const Routing& routing = arguments.routing;
  const int32_t n_ranks = exchange.shape.n_ranks;
  const Pieces pieces = PiecesOf(routing, n_ranks, arguments.row_bytes);
  return LaunchExchange(ThereKernelFor(routing), exchange, arguments, options, pieces,
                        SendersThere(routing, options, n_ranks, pieces), stream);
}

cudaError_t LaunchBack(const Exchange& exchange, const BackArguments& arguments,
                       const ExchangeOptions& options, cudaStream_t stream) {
  const Routing& routing = arguments.routing;
  return LaunchExchange(BackKernelFor(routing, arguments.type), exchange, arguments, options,
                        PiecesOf(routing, exchange.shape.n_ranks, arguments.row_bytes),
                        Senders(routing, options), stream);
}

// Rows are not cut, see PutWindowShape.
template <typename Arguments>
static cudaError_t LaunchPut(const void* kernel, int64_t room, const PutExchange& exchange,
                             const Arguments& arguments, const ExchangeOptions& options,
                             cudaStream_t stream) {
  if (!Fits(arguments, exchange.shape)) return cudaErrorInvalidValue;
  LaunchShape shape = {dim3(options.n_blocks), kPutThreads};
  cudaError_t error = ShapeBlock(exchange.shape.n_ranks, room, &shape);
  if (error != cudaSuccess) return error;
  if (shape.shared_bytes > kUnaskedSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const Pieces whole = {arguments.row_bytes, 1, arguments.row_bytes};
  const int32_t n_senders = Senders(arguments.routing, options);
  const void* parameters[] = {&exchange, &arguments, &whole, &n_senders};
  return cudaLaunchKernel(kernel, shape.grid, dim3(shape.threads), const_cast<void**>(parameters),
                          shape.shared_bytes, stream);
}

cudaError_t LaunchTherePut(const void* kernel, const PutExchange& exchange,
                           const ThereArguments& arguments, const ExchangeOptions& options,
                           cudaStream_t stream) {
  return LaunchPut(kernel, 0, exchange, arguments, options, stream);
}

cudaError_t LaunchBackPut(const void* kernel, const PutExchange& exchange,
                          const BackArguments& arguments, const ExchangeOptions& options,
                          cudaStream_t stream) {
  return LaunchPut(kernel, sizeof(SumRoom<Putting>), exchange, arguments, options, stream);
}

cudaError_t PreloadExchange() {
  cudaFuncAttributes attributes;
  Routing routing = {};
  for (const int32_t top_k : {1, 2}) {
    routing.top_k = top_k;
    const auto there = reinterpret_cast<const void*>(ThereKernelFor(routing).function);
    cudaError_t error = cudaFuncGetAttributes(&attributes, there);
    for (const RowType type :
         {RowType::kBFloat16, RowType::kFloat16, RowType::kFloat32, RowType::kFloat64}) {
      if (error != cudaSuccess) return error;
      const auto back = reinterpret_cast<const void*>(BackKernelFor(routing, type).function);
      error = cudaFuncGetAttributes(&attributes, back);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lplb::cuda
