// sync_loads where a peer's memory cannot be mapped, for example on another host, by NVSHMEM's put
// with signal. In a file of its own, which is linked with NVSHMEM's device library and loaded on
// demand.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/sync.cuh"

namespace lplb::cuda {
namespace {

// Waits until all words of `source` have arrived. Returns false if they do not arrive in time.
__device__ bool AwaitSignal(const Peers& peers, const PutPeers& put, const SyncCall& call,
                            int32_t source) {
  // A source can be at most one call ahead.
  while (static_cast<int32_t>(static_cast<uint32_t>(nvshmem_signal_fetch(put.signals + source)) -
                              call.epoch) < 0) {
    if (call.patience.Lasts(peers.timeout_ns)) continue;
    Report(peers, SyncFailure::kTimeout, call.epoch, source);
    return false;
  }
  return true;
}

}  // namespace

extern "C" __global__ void lplb_sync_put(const Peers peers, const PutPeers put, const int32_t* rank,
                                         const int32_t* counts, int32_t n, int32_t* matrix) {
  const SyncCall call = BeginSync(peers, peers.state->epoch + 1, *rank, /*leader=*/true);
  uint64_t* staging = put.staging + static_cast<int64_t>(call.epoch & 1) * peers.stride;
  for (int32_t i = threadIdx.x; i < n; i += blockDim.x) {
    staging[i] = WordOf(call.epoch, call.failed, counts[i]);
    for (int32_t peer = 0; peer < peers.size; ++peer) {
      if (peers.inboxes[peer] != nullptr) Send(peers, call, peers.inboxes[peer], i, counts[i]);
    }
  }
  __syncthreads();
  for (int32_t peer = 0; peer < peers.size; ++peer) {
    if (peers.inboxes[peer] != nullptr) continue;
    nvshmemx_putmem_signal_block(put.inbox + call.RowOf(peers, peers.rank), staging,
                                 static_cast<size_t>(n) * sizeof(uint64_t),
                                 put.signals + peers.rank, call.epoch, NVSHMEM_SIGNAL_SET,
                                 put.pes[peer]);
  }
  bool failed = call.failed;
  for (int32_t source = threadIdx.x; source < peers.size && !failed; source += blockDim.x) {
    if (peers.inboxes[source] == nullptr) failed = !AwaitSignal(peers, put, call, source);
  }
  failed = __syncthreads_or(failed);
  for (int32_t i = threadIdx.x; i < n && !failed; i += blockDim.x) {
    failed = !Receive(peers, call, i, 0, peers.size, /*leader=*/true,
                      [&](int32_t source, int32_t count) {
                        matrix[static_cast<int64_t>(source) * n + i] = count;
                      });
  }
  FinishSync(peers, call, failed, n, matrix);
}

}  // namespace lplb::cuda
