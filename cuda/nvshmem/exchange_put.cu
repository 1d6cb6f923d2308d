// Tokens to rows on all ranks, and rows back to tokens, by NVSHMEM's put, which also reaches ranks
// whose memory cannot be mapped, for example on other hosts. Linked and loaded as sync_put.cu.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/exchange_kernels.cuh"

namespace lplb::cuda {

__device__ __forceinline__ void SendHeader(const PutExchange& exchange, int32_t rank,
                                           uint64_t* header, uint64_t value) {
  nvshmemx_signal_op(header, value, NVSHMEM_SIGNAL_SET, exchange.pes[rank]);
}

// Once a signal has come, NVSHMEM makes what it announces visible, where the network card does not.
__device__ __forceinline__ bool HasCome(const PutExchange&, uint64_t* flag, uint32_t epoch) {
  return LoadAcquired(flag) == epoch && nvshmem_uint64_test(flag, NVSHMEM_CMP_EQ, epoch) != 0;
}

// Rows are packed into parcels, see PutWindowShape, which leave at once.
template <>
class Outbox<PutExchange> {
 public:
  __device__ __forceinline__ Outbox(const Pieces&, int32_t) {}

  static constexpr List kThere = kStartsReturn;
  static constexpr List kBack = kStartsHere;

  __device__ __forceinline__ static Slot<PutExchange> SlotTo(const PutExchange& exchange,
                                                             const ExchangeCall& call, int32_t) {
    return SlotAt(exchange, call.windows[exchange.peers.rank] +
                                (2 + (call.epoch & 1)) * exchange.shape.SlotBytes());
  }
  __device__ __forceinline__ void Add(const PutExchange& exchange, const ExchangeCall& call,
                                      const Pieces& pieces, bool sends,
                                      const Slot<PutExchange>& slot, int64_t entry, int32_t rank,
                                      int64_t arrives) {
    const PutWindowShape& shape = exchange.shape;
    const Slot<PutExchange> there = SlotOf(exchange, call, exchange.peers.rank);
    for (uint32_t rest = __ballot_sync(kFullWarp, sends); rest != 0; rest &= rest - 1) {
      const int lane = __ffs(rest) - 1;
      const auto packed = __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(slot.gates), lane) +
                          __shfl_sync(kFullWarp, entry, lane) * shape.ParcelBytes();
      const int64_t place = __shfl_sync(kFullWarp, arrives, lane);
      const int32_t to = __shfl_sync(kFullWarp, rank, lane);
      nvshmemx_putmem_signal_nbi_warp(
          reinterpret_cast<char*>(there.gates) + place * shape.ParcelBytes(),
          reinterpret_cast<const char*>(packed), shape.RowAt() + pieces.row_bytes,
          there.flags + place, call.epoch, NVSHMEM_SIGNAL_SET, exchange.pes[to]);
    }
  }
  __device__ __forceinline__ void LeaveIfMany(const ExchangeCall&) {}
  __device__ __forceinline__ void Leave(const ExchangeCall&) {}
};

extern "C" __global__ void __launch_bounds__(kPutThreads, 1)
    lplb_there_put(const PutExchange exchange, const ThereArguments in, const Pieces pieces,
                   int32_t n_senders) {
  There<Putting>(exchange, in, pieces, n_senders);
}

// They are found by name, so each type has its own function.
#define LPLB_BACK_PUT(name, T)                                                      \
  extern "C" __global__ void __launch_bounds__(kPutThreads, 1)                      \
      name(const PutExchange exchange, const BackArguments in, const Pieces pieces, \
           int32_t n_senders) {                                                     \
    Back<T, Putting>(exchange, in, pieces, n_senders);                              \
  }
LPLB_BACK_PUT(lplb_back_put_bfloat16, __nv_bfloat16)
LPLB_BACK_PUT(lplb_back_put_float16, __half)
LPLB_BACK_PUT(lplb_back_put_float32, float)
LPLB_BACK_PUT(lplb_back_put_float64, double)
#undef LPLB_BACK_PUT

}  // namespace lplb::cuda
