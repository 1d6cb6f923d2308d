// sync_loads: shares every rank's counts with all ranks, by one block that writes to its peers'
// memory.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/launch.cuh"
#include "cuda/sync.cuh"

namespace lplb::cuda {
namespace {

constexpr int32_t kSyncThreads = 1024;

// Each thread handles `sources_each` ranks, and every count with the same index modulo
// 2^width_log2.
__global__ void __launch_bounds__(kSyncThreads)
    SyncKernel(const Peers peers, const int32_t* rank, const int32_t* counts, int32_t n,
               int32_t* matrix, int32_t width_log2, int32_t sources_each) {
  const int32_t width = 1 << width_log2;
  const int32_t first = static_cast<int32_t>(threadIdx.x) & (width - 1);
  const int32_t source = (static_cast<int32_t>(threadIdx.x) >> width_log2) * sources_each;
  const int32_t n_sources = min(sources_each, peers.size - source);
  // These loads are in flight together.
  uint64_t* inbox = n_sources > 0 ? peers.inboxes[source] : nullptr;
  const int32_t count = first < n ? counts[first] : 0;
  const SyncCall call = BeginSync(peers, peers.state->epoch + 1, *rank, /*leader=*/true);
  bool failed = false;
  if (n_sources > 0) {
    for (int32_t peer = source; peer < source + n_sources; ++peer) {
      if (peer != source) inbox = peers.inboxes[peer];
      for (int32_t i = first; i < n; i += width) {
        Send(peers, call, inbox, i, i == first ? count : counts[i]);
      }
    }
    for (int32_t i = first; i < n; i += width) {
      failed |= !Receive(peers, call, i, source, n_sources, /*leader=*/true,
                         [&](int32_t from, int32_t received) {
                           matrix[static_cast<int64_t>(from) * n + i] = received;
                         });
    }
  }
  FinishSync(peers, call, failed, n, matrix);
}

}  // namespace

cudaError_t LaunchSync(const Peers& peers, const int32_t* rank, const int32_t* counts, int32_t n,
                       int32_t* matrix, cudaStream_t stream) {
  // One thread per count, as far as they suffice; further threads handle other ranks.
  int32_t width_log2 = 5;
  while (1 << width_log2 < std::min(n, kSyncThreads)) ++width_log2;
  const int32_t n_parts = kSyncThreads >> width_log2;
  const int32_t sources_each = (peers.size + n_parts - 1) / n_parts;
  return Launch(SyncKernel, {dim3(1), kSyncThreads}, stream, peers, rank, counts, n, matrix,
                width_log2, sources_each);
}

cudaError_t LaunchSyncPut(const void* kernel, const Peers& peers, const PutPeers& put,
                          const int32_t* rank, const int32_t* counts, int32_t n, int32_t* matrix,
                          cudaStream_t stream) {
  const void* arguments[] = {&peers, &put, &rank, &counts, &n, &matrix};
  return cudaLaunchKernel(kernel, dim3(1), dim3(kSyncThreads / 2), const_cast<void**>(arguments), 0,
                          stream);
}

cudaError_t PreloadSync() {
  Device device;  // Asking for it loads a kernel, too.
  const cudaError_t error = CurrentDevice(&device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(SyncKernel));
}

}  // namespace lplb::cuda
