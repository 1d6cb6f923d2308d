// How ranks share their counts: pointers, sizes and a stream in, cudaError_t out.
#ifndef LPLB_CUDA_SYNC_H_
#define LPLB_CUDA_SYNC_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lplb::cuda {

// What one rank keeps between calls, in device memory; zero at first. Calls on one communicator are
// in order on a device, so nothing else changes it while a kernel runs.
struct SyncState {
  uint32_t epoch;   // calls so far
  uint32_t ticket;  // blocks that have counted; 0 between calls
  int32_t failed;   // sticky: nobody waits any more
};

enum class SyncFailure : int32_t { kNone = 0, kTimeout = 1, kWrongRank = 2, kNoTokens = 3 };

// The first failure, in pinned host memory.
struct SyncReport {
  int32_t failure;  // a SyncFailure, written last
  int32_t rank;     // who waited
  int32_t peer;     // for whom; with kWrongRank, what the program takes this rank for
  uint32_t epoch;   // in which call
};

// How a kernel reaches the ranks of its group. It does not change between calls, so a launch may be
// captured.
//
// An inbox is [2, size, stride] of 64-bit words, an epoch above a count: the ranks' rows, twice. A
// word is written at once, so whoever finds the epoch that he waits for has the count. Two slots
// suffice, taken in turn: a rank writes epoch e + 2 only after it has everybody's e + 1, which they
// send once they are done with e.
struct Peers {
  const uint64_t* inbox;     // this rank's own
  uint64_t* const* inboxes;  // [size], in device memory; this rank's own is one of them
  SyncState* state;
  SyncReport* report;
  int64_t timeout_ns;
  int32_t rank;
  int32_t size;
  int32_t stride;
};

inline int64_t InboxBytes(int32_t size, int32_t stride) { return 2 * int64_t{8} * size * stride; }

// What the put kernel needs besides, where peers cannot be mapped; all on the symmetric heap but
// pes.
struct PutPeers {
  uint64_t* inbox;     // this rank's own: the same object in every process
  uint64_t* staging;   // [2, stride], words on their way
  uint64_t* signals;   // [size], of every rank the last epoch that has come completely
  const int32_t* pes;  // [size], in device memory
};

// matrix [size, n]: every rank's counts [n], n ≤ stride. `rank` [] is checked against peers.rank;
// after a failure the matrix is −1.
cudaError_t LaunchSync(const Peers& peers, const int32_t* rank, const int32_t* counts, int32_t n,
                       int32_t* matrix, cudaStream_t stream);

// The same with `kernel` of nvshmem/sync_put.cu; peers.inboxes is null where a peer is not mapped.
cudaError_t LaunchSyncPut(const void* kernel, const Peers& peers, const PutPeers& put,
                          const int32_t* rank, const int32_t* counts, int32_t n, int32_t* matrix,
                          cudaStream_t stream);

// Loads the kernels: doing so while another one waits for its peers can block the driver.
cudaError_t PreloadSync();

}  // namespace lplb::cuda

#endif  // LPLB_CUDA_SYNC_H_
