// sync_loads: every rank's counts on all ranks, by one block that writes to its peers' memory.
#include "cuda/sync.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kSyncThreads = 1024;

__global__ void __launch_bounds__(kSyncThreads)
    SyncKernel(const Peers peers, const int32_t* rank, const int32_t* counts, int32_t n,
               int32_t* matrix) {
  // Each part of the threads takes care of every n_parts-th rank.
  const int32_t n_parts = min(peers.size, kSyncThreads / 32);
  const int32_t width = kSyncThreads / n_parts;
  const int32_t part = static_cast<int32_t>(threadIdx.x) / width;
  const int32_t first = static_cast<int32_t>(threadIdx.x) - part * width;
  const bool live = part < n_parts;
  // These loads are on their way together.
  uint64_t* inbox = live ? peers.inboxes[part] : nullptr;
  int32_t count = first < n ? counts[first] : 0;
  const SyncCall call = BeginSync(peers, peers.state->epoch + 1, *rank, /*leader=*/true);
  bool failed = false;
  if (live) {
    for (int32_t peer = part; peer < peers.size; peer += n_parts) {
      if (peer != part) inbox = peers.inboxes[peer];
      for (int32_t i = first; i < n; i += width) {
        Send(peers, call, inbox, i, i == first ? count : counts[i]);
      }
    }
    for (int32_t source = part; source < peers.size; source += n_parts) {
      for (int32_t i = first; i < n; i += width) {
        failed |=
            !Receive(peers, call, i, source, 1, /*leader=*/true, [&](int32_t, int32_t received) {
              matrix[static_cast<int64_t>(source) * n + i] = received;
            });
      }
    }
  }
  FinishSync(peers, call, failed, n, matrix);
}

}  // namespace

cudaError_t LaunchSync(const Peers& peers, const int32_t* rank, const int32_t* counts, int32_t n,
                       int32_t* matrix, cudaStream_t stream) {
  SyncKernel<<<1, kSyncThreads, 0, stream>>>(peers, rank, counts, n, matrix);
  return cudaGetLastError();
}

cudaError_t LaunchSyncPut(const void* kernel, const Peers& peers, const PutPeers& put,
                          const int32_t* rank, const int32_t* counts, int32_t n, int32_t* matrix,
                          cudaStream_t stream) {
  const void* arguments[] = {&peers, &put, &rank, &counts, &n, &matrix};
  return cudaLaunchKernel(kernel, dim3(1), dim3(kSyncThreads / 2), const_cast<void**>(arguments), 0,
                          stream);
}

cudaError_t PreloadSync() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(SyncKernel));
}

}  // namespace lplb::cuda
